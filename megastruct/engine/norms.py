"""The gradient norm where DeepSpeed does not compute it, or not over all stages."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import combine_grad_norm_groups
from torch import nn

from megastruct.config.schema import Config
from megastruct.engine.zero import is_tied_copy


def set_up_norm(
    wrapper: Any, module: Any, config: Config, pp_size: int, counts_replicated: bool
) -> GradientClipper | None:
    """Have gradient norms counted over all stages: by the clipper that it returns, or by DeepSpeed. Collective.

    `wrapper`: DeepSpeed's optimizer, or ours where ZeRO is off. `counts_replicated` as in `GradientClipper`.
    """
    if config.parallel.zero_stage == 0:
        max_norm = config.optimizer.gradient_clipping
        clipper = GradientClipper(module.parameters(), max_norm, module.replica_group, counts_replicated)
        wrapper.register_step_pre_hook(clipper)
        return clipper
    if config.training.precision == "fp32" and pp_size > 1:
        sum_norms_over_stages(wrapper, module.replica_group)
    return None


def sum_norms_over_stages(zero: Any, model_group: Any) -> None:
    """Make ZeRO 1 compute its gradient norm over stages with different numbers of parameter groups. Collective.

    `DeepSpeedZeroOptimizer.scaled_global_norm` sums over `model_group` (the ranks of one replica) once per group of its
    own stage: a stage with fewer groups has to take part in the remaining sums, with nothing.
    """
    own = len(zero.params_in_partition)
    count = torch.tensor(own, device=zero.device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX, group=model_group)
    nothing: list[Any] = [[]] * (int(count) - own)

    def scaled_global_norm(norm_type: int = 2) -> torch.Tensor:
        gradients = [*(zero.averaged_gradients[group] for group in range(own)), *nothing]
        parameters = [*zero.params_in_partition, *nothing]
        norms = [zero.get_grad_norm_direct(*pair) for pair in zip(gradients, parameters, strict=True)]
        return combine_grad_norm_groups(norms)

    if nothing:
        zero.scaled_global_norm = scaled_global_norm


class GradientClipper:
    """Global-norm clipping of plain (unpartitioned) gradients over the ranks of one replica; keeps the last norm.

    A step whose norm is not finite is skipped, as ZeRO skips it.

    Hooked before the optimizer's step where ZeRO is off: there DeepSpeed clips by a norm that misses the unmarked
    parameters of all stages but the first (`clip_grad_norm_` in deepspeed/runtime/utils.py).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], max_norm: float, model_group: Any, counts_replicated: bool
    ) -> None:
        """`counts_replicated`: whether this tensor-parallel rank is the one that counts what all of them hold."""
        self.parameters, self.max_norm, self.model_group = list(parameters), max_norm, model_group
        # A tied weight has a copy on another stage, with the same summed gradient: it counts once, too.
        self.counted = [
            p
            for p in self.parameters
            if not is_tied_copy(p) and (counts_replicated or getattr(p, "tensor_model_parallel", False))
        ]
        self.norm = 0.0

    @torch.no_grad()
    def __call__(self, *_: Any) -> None:
        """Compute the norm and clip; called before every step of the optimizer. Collective over the replica."""
        squares = [p.grad.float().square().sum() for p in self.counted if p.grad is not None]
        device = self.parameters[0].device
        # In float64, so that parameters without a gradient (guides that are skipped) do not move the last bit.
        total = torch.stack(squares).double().sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self.model_group)
        self.norm = float(total.sqrt())
        if not math.isfinite(self.norm):
            for p in self.parameters:
                p.grad = None  # the optimizer passes over the parameter: weight and state stay as they are
        elif self.max_norm and self.norm > self.max_norm:
            for p in self.parameters:
                if p.grad is not None:
                    p.grad.mul_(self.max_norm / (self.norm + 1e-6))
