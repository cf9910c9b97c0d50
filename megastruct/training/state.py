"""The optimizer's state as whole tensors by global name, out of and into any of DeepSpeed's optimizers.

`capture` gathers, for every parameter of this rank's stage, the fp32 master and Adam's two moments over the replicas;
`restore` puts them back, on whatever layout the engine has. Both are collective over the data-parallel group.
Facts about DeepSpeed's classes were found by running them (0.19.8):
- `BF16_Optimizer` and ZeRO 1/2 keep flat fp32 partitions and link parameters to fragments of them lazily; ZeRO 1/2
  links after the first group's step only, so with several groups the link has to be forced.
- ZeRO 3's `set_full_hp_param` runs over the end where the replicas do not divide a parameter: the padding is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from megastruct.training.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class ParameterState:
    """One parameter's fp32 master and Adam moments, each of the parameter's own shape, on the CPU."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def capture(engine: Engine) -> dict[str, ParameterState]:
    """State of all parameters on this rank, by global name. Before the first step the moments are zero."""
    _link(engine)
    return {name: _get(engine, parameter) for name, parameter in engine.named_parameters()}


def restore(engine: Engine, state: dict[str, ParameterState], step: int) -> None:
    """The inverse of `capture`, for an engine after `step` optimizer steps. Raises KeyError for a missing name."""
    for flat in _adam_tensors(engine):
        adam = engine_adam(engine).state[flat]
        adam["step"] = torch.tensor(float(step), device=flat.device if engine.device.type == "cuda" else "cpu")
        for moment in MOMENTS:
            adam[moment] = torch.zeros_like(flat)
    _link(engine)
    for name, parameter in engine.named_parameters():
        _set(engine, parameter, state[name])
    if engine.config.parallel.zero_stage == 3:
        _refresh_zero3_weights(engine)
    engine.deepspeed.global_steps = step
    engine.deepspeed.global_samples = step * engine.config.training.global_batch_size
    engine.deepspeed.micro_steps = step * engine.deepspeed.gradient_accumulation_steps()


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


def _link(engine: Engine) -> None:
    zero = engine.zero_optimizer
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        for flat in _adam_tensors(engine):
            for moment in MOMENTS:
                engine_adam(engine).state[flat].setdefault(moment, torch.zeros_like(flat))
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _get(engine: Engine, parameter: nn.Parameter) -> ParameterState:
    if engine.config.parallel.zero_stage == 0:
        adam = engine_adam(engine).state[parameter]
        moments = [adam.get(moment, torch.zeros_like(parameter)) for moment in MOMENTS]
        return ParameterState(*(tensor.detach().cpu().clone() for tensor in (parameter, *moments)))
    shape = getattr(parameter, "ds_shape", parameter.shape)
    tensors = [safe_get_full_fp32_param(parameter)]
    tensors += [safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS]
    return ParameterState(*(tensor.detach().view(shape).cpu().clone() for tensor in tensors))


@torch.no_grad()
def _set(engine: Engine, parameter: nn.Parameter, state: ParameterState) -> None:
    stage = engine.config.parallel.zero_stage
    moments: dict[str, Tensor] = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    if stage == 0:
        parameter.copy_(state.master)
        for moment, value in moments.items():
            engine_adam(engine).state[parameter][moment].copy_(value)
    elif stage == 3:
        safe_set_local_fp32_param(parameter, _partition(engine, parameter, state.master))
        for moment, value in moments.items():
            safe_set_local_optimizer_state(parameter, _partition(engine, parameter, value), moment)
    else:
        safe_set_full_fp32_param(parameter, state.master.to(engine.device))
        for moment, value in moments.items():
            safe_set_full_optimizer_state(parameter, value.to(engine.device), moment)
        parameter.copy_(state.master.to(parameter.dtype))


def _partition(engine: Engine, parameter: Any, value: Tensor) -> Tensor:
    """This replica's slice of a parameter under ZeRO 3, zero-padded at the end as DeepSpeed pads it."""
    size = parameter.ds_tensor.ds_numel
    flat = torch.zeros(size * engine.topology.dp_size)
    flat[: value.numel()] = value.flatten()
    rank = engine.topology.dp_rank(torch.distributed.get_rank())
    return flat[rank * size : (rank + 1) * size].to(engine.device)


def _refresh_zero3_weights(engine: Engine) -> None:
    """Copy the masters into the partitions that forwards gather (the low-precision ones in bf16)."""
    zero = engine.zero_optimizer
    for index in range(len(zero.fp32_partitioned_groups_flat)):
        zero.fp16_partitioned_groups_flat[index].data.copy_(zero.fp32_partitioned_groups_flat[index].data)
        zero._unflatten_partitioned_parameters(index)
