"""Where DeepSpeed keeps masters and optimizer state, by ZeRO stage: the only file that reads and writes them there.

- Without ZeRO (stage 0) the optimizer steps the parameters themselves.
- `BF16_Optimizer` and ZeRO 1 and 2 keep flat fp32 partitions, one for each parameter group, and link parameters to
  fragments of them lazily. ZeRO 1 and 2 link after the first group's step only, so with several groups the link has to
  be forced.
- ZeRO 3 cuts every parameter into equal parts, of which the last ones may be padding in part or whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch import Tensor, nn
from torch.optim import Optimizer as TorchOptimizer

from megastruct.optimizers import MASTER


def inner_optimizer(wrapper: Any) -> TorchOptimizer:
    """Our optimizer, below whatever DeepSpeed wraps around it."""
    return getattr(wrapper, "optimizer", wrapper)


def stepped_tensors(wrapper: Any) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """(parameter group, tensor) of everything that the optimizer really steps: flat fp32 partitions, or parameters."""
    groups = inner_optimizer(wrapper).param_groups
    for attribute in ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        if hasattr(wrapper, attribute):
            flats = list(getattr(wrapper, attribute))
            of_group = getattr(wrapper, "sub_group_to_group_id", None)
            indices = range(len(flats)) if of_group is None else [of_group[index] for index in range(len(flats))]
            yield from ((groups[group], flat) for group, flat in zip(indices, flats, strict=True))
            return
    yield from ((group, parameter) for group in groups for parameter in group["params"])


def link_fragments(wrapper: Any) -> None:
    """Tie parameters to their fragments of the flat partitions, of the optimizer's state too."""
    if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
        wrapper._hp_optimizer_states_linked = False
        wrapper._lazy_init_hp_params_optimizer_state()


def own_fragment(
    wrapper: Any, parameter: Any, zero_stage: int, dp_rank: int, kinds: Iterable[str]
) -> tuple[int, dict[str, Tensor]]:
    """(where it starts in the flattened parameter, fp32 tensors [n] by kind) of what this rank owns of a parameter.

    `kinds`: of the optimizer's state; the master comes with them. No tensors if the rank owns nothing of it.
    """
    if zero_stage == 0:
        state = inner_optimizer(wrapper).state[parameter]
        tensors = {MASTER: parameter} | {kind: state[kind] for kind in kinds}
        return 0, {kind: tensor.detach().view(-1) for kind, tensor in tensors.items()}
    if zero_stage == 3:
        size = parameter.ds_tensor.ds_numel
        start = size * dp_rank
        owned = max(0, min(size, parameter.ds_numel - start))
        parts = {kind: safe_get_local_optimizer_state(parameter, kind) for kind in kinds}
        tensors = {MASTER: safe_get_local_fp32_param(parameter)} | parts
        return start, {kind: tensor.detach()[:owned] for kind, tensor in tensors.items()} if owned else {}
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, {}
    tensors = {MASTER: mapping.hp_fragment} | {kind: mapping.optim_fragment[kind] for kind in kinds}
    return mapping.lp_fragment_address.start, {kind: tensor.detach() for kind, tensor in tensors.items()}


def write_weights(wrapper: Any, zero_stage: int) -> None:
    """Make the weights from the masters, as after an optimizer step. Collective over the data-parallel group."""
    if zero_stage in (1, 2):
        wrapper.update_lp_params()
    elif zero_stage == 3:
        wrapper._partition_all_parameters()  # an engine that has trained keeps small ones gathered, as they were
        for index, masters in enumerate(wrapper.fp32_partitioned_groups_flat):
            wrapper.fp16_partitioned_groups_flat[index].data.copy_(masters.data)
            wrapper._unflatten_partitioned_parameters(index)


def set_step_counts(engine: Any, step: int, num_samples: int) -> None:
    """Have DeepSpeed count from `step` finished steps of `num_samples` samples in all."""
    engine.global_steps = step
    engine.global_samples = num_samples
    engine.micro_steps = step * engine.gradient_accumulation_steps()


def set_batch_size(engine: Any, global_batch_size: int) -> None:
    """Have DeepSpeed accumulate the gradients of that many samples in its next steps.

    Without a pipeline it finds a step's last micro-batch by their count so far, which has to be a multiple of those of
    a step.
    """
    if engine.train_batch_size() != global_batch_size:
        engine.set_train_batch_size(global_batch_size)
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of this tensor-parallel rank's parameter, also where ZeRO 3 has cut it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_tied_copy(parameter: Any) -> bool:
    """Whether it is the copy of a tied weight on another stage."""
    return getattr(parameter, "ds_pipe_replicated", False)


def gathered(parameters: Sequence[Tensor], zero_stage: int) -> Any:
    """A context in which the parameters are whole, on all ranks of the data-parallel group. Collective over it."""
    return deepspeed.zero.GatheredParameters(list(parameters)) if zero_stage == 3 else contextlib.nullcontext()


def accumulated_gradient(parameter: Any, in_bf16: bool) -> Tensor | None:
    """The gradient summed over the micro-batches so far; in bf16 with ZeRO 1 in fp32, beside the parameter."""
    return parameter._hp_grad if in_bf16 else parameter.grad


def partition(
    layer: nn.Module, first: nn.Module, replicas: Any, dtype: torch.dtype, config: dict[str, Any], mpu: Any
) -> None:
    """Cut the parameters of a layer over the process group of the replicas, as ZeRO 3 does. Collective over it.

    `first`: the layer with which this was called first. `config`, `mpu`: as for `deepspeed.initialize`.
    """
    cut: Any = next((parameter for parameter in first.parameters() if hasattr(parameter, "ds_id")), None)
    if cut is None:
        deepspeed.zero.Init(layer, replicas, dtype=dtype, config_dict_or_path=config, mpu=mpu)
    else:  # in the same way; reading the config for every layer takes seconds
        cut.convert_to_zero_parameters(param_list=list(layer.parameters()))


def release(engine: Any) -> None:
    """Have an engine of DeepSpeed let go of its optimizer, its module and all that they hold."""
    engine.module_forward_pre_hook.remove()  # destroy() leaves them on the module
    engine.module_forward_post_hook.remove()
    wrapper = engine.optimizer
    engine.destroy()
    # Hooks of old outputs still hold both; what they held must go now. And the engine must not find its optimizer when
    # it is collected at last: its destructor would destroy it once more, and unlink the parameters that the next
    # engine's optimizer has linked by then.
    for emptied in (wrapper, engine):
        emptied.__dict__.clear()


def empty_parameters(parameters: Iterable[Any]) -> None:
    """Give back the memory of parameters that are not used again; what ZeRO 3 hangs on them outlives their module."""
    for parameter in parameters:
        for tensor in (parameter, getattr(parameter, "ds_tensor", parameter)):
            tensor.data = tensor.new_empty(0)
