"""The optimizer's state where DeepSpeed keeps it: of every parameter the fragment that this rank owns.

Under ZeRO a rank owns a contiguous part of each parameter's fp32 master and of Adam's two moments, or nothing of it:
`fragments` gives views of them, to be read into a checkpoint and to be filled from one. Nothing is gathered.
Facts about DeepSpeed's classes were found by running them (0.19.8):
- `BF16_Optimizer` and ZeRO 1/2 keep flat fp32 partitions and link parameters to fragments of them lazily; ZeRO 1/2
  links after the first group's step only, so with several groups the link has to be forced.
- ZeRO 3 cuts every parameter into equal parts, of which the last ones may be padding in part or whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch import Tensor, nn

from megastruct.engine.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("master", *MOMENTS)


@dataclass
class Fragment:
    """Elements [start, start + n) of a parameter of this rank, flattened row by row: master and moments, by kind.

    `tensors`: fp32 [n] each, views of what the optimizer steps.
    """

    name: str
    parameter: nn.Parameter
    start: int
    tensors: dict[str, Tensor]

    def share(self, index: int, count: int) -> Fragment:
        """Part `index` of `count`, equal but for the last ones."""
        length = -(-self.tensors["master"].numel() // count)
        tensors = {kind: tensor[index * length : (index + 1) * length] for kind, tensor in self.tensors.items()}
        return Fragment(self.name, self.parameter, self.start + index * length, tensors)


def fragments(engine: Engine) -> Iterator[Fragment]:
    """What this rank owns, of each of its parameters by global name. Before the first step the moments are zero."""
    _start_adam(engine, 0, [flat for flat in _adam_tensors(engine) if not engine_adam(engine).state[flat]])
    _link(engine)
    for name, parameter in engine.named_parameters():
        start, tensors = _owned(engine, parameter)
        if tensors:
            yield Fragment(name, parameter, start, tensors)


def saved_fragments(engine: Engine) -> Iterator[Fragment]:
    """What this rank writes of a checkpoint: of what several ranks own, its share."""
    topology = engine.topology
    for fragment in fragments(engine):
        is_part = hasattr(fragment.parameter, "shard_spec")
        is_copy = getattr(fragment.parameter, "ds_pipe_replicated", False)  # of a tied weight on another stage
        if is_copy or not (is_part or engine.tp.rank == 0):
            continue
        if engine.config.parallel.zero_stage == 0:
            fragment = fragment.share(topology.dp_rank(dist.get_rank()), topology.dp_size)
        yield fragment


def begin_restore(engine: Engine, step: int, skipped_steps: int = 0) -> dict[str, Fragment]:
    """The fragments of an engine after `step` steps, to be filled; then `finish_restore`.

    `skipped_steps`: those of them of which the optimizer made no step.
    """
    _start_adam(engine, step - skipped_steps, _adam_tensors(engine))
    engine.deepspeed.global_steps = step
    engine.deepspeed.global_samples = step * engine.config.training.global_batch_size
    engine.deepspeed.micro_steps = step * engine.deepspeed.gradient_accumulation_steps()
    return {fragment.name: fragment for fragment in fragments(engine)}


def finish_restore(engine: Engine) -> None:
    """Make the weights from the masters, as after an optimizer step. Collective over the data-parallel group."""
    zero = engine.zero_optimizer
    if engine.config.parallel.zero_stage in (1, 2):
        zero.update_lp_params()
    elif engine.config.parallel.zero_stage == 3:
        zero._partition_all_parameters()  # an engine that has trained keeps small ones gathered, as they were
        for index, masters in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[index].data.copy_(masters.data)
            zero._unflatten_partitioned_parameters(index)


def engine_adam(engine: Engine) -> torch.optim.Optimizer:
    """Our AdamW, below whatever DeepSpeed wraps around it."""
    return getattr(engine.zero_optimizer, "optimizer", engine.zero_optimizer)


def _adam_tensors(engine: Engine) -> list[Tensor]:
    """The tensors that AdamW really steps: flat fp32 partitions, or the parameters themselves without ZeRO."""
    zero = engine.zero_optimizer
    for attribute in ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        if hasattr(zero, attribute):
            return list(getattr(zero, attribute))
    return [parameter for group in zero.param_groups for parameter in group["params"]]


def _start_adam(engine: Engine, step: int, tensors: list[Tensor]) -> None:
    for flat in tensors:
        adam = engine_adam(engine).state[flat]
        adam["step"] = torch.tensor(float(step), device=flat.device if engine.device.type == "cuda" else "cpu")
        for moment in MOMENTS:
            adam[moment] = torch.zeros_like(flat)


def _link(engine: Engine) -> None:
    zero = engine.zero_optimizer
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _owned(engine: Engine, parameter: Any) -> tuple[int, dict[str, Tensor]]:
    """(where it starts, tensors by kind) of this rank's fragment; no tensors if it owns none."""
    stage = engine.config.parallel.zero_stage
    if stage == 0:
        adam = engine_adam(engine).state[parameter]
        return 0, {kind: tensor.detach().view(-1) for kind, tensor in _by_kind(parameter, adam).items()}
    if stage == 3:
        size = parameter.ds_tensor.ds_numel
        start = size * engine.topology.dp_rank(dist.get_rank())
        owned = max(0, min(size, parameter.ds_numel - start))
        moments = {moment: safe_get_local_optimizer_state(parameter, moment) for moment in MOMENTS}
        tensors = _by_kind(safe_get_local_fp32_param(parameter), moments)
        return start, {kind: tensor.detach()[:owned] for kind, tensor in tensors.items()} if owned else {}
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, {}
    tensors = _by_kind(mapping.hp_fragment, mapping.optim_fragment)
    return mapping.lp_fragment_address.start, {kind: tensor.detach() for kind, tensor in tensors.items()}


def _by_kind(master: Tensor, moments: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"master": master} | {moment: moments[moment] for moment in MOMENTS}
