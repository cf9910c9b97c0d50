"""AdamW over two groups, and the gradient norm where DeepSpeed does not compute it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megastruct.config.schema import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig, device_type: str) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and none on vectors (norms, biases); fused on CUDA."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay, "name": "matrices"},
        {"params": vectors, "weight_decay": 0.0, "name": "vectors"},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=device_type == "cuda",
    )


class GradientClipper:
    """Global-norm clipping of plain (unpartitioned) gradients over the ranks of one replica; keeps the last norm.

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
            if not getattr(p, "ds_pipe_replicated", False)
            and (counts_replicated or getattr(p, "tensor_model_parallel", False))
        ]
        self.norm = 0.0

    @torch.no_grad()
    def __call__(self, *_: Any) -> None:
        squares = [p.grad.float().square().sum() for p in self.counted if p.grad is not None]
        device = self.parameters[0].device
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=device)
        dist.all_reduce(total, group=self.model_group)
        self.norm = float(total.sqrt())
        if self.max_norm and self.norm > self.max_norm:
            for p in self.parameters:
                if p.grad is not None:
                    p.grad.mul_(self.max_norm / (self.norm + 1e-6))
