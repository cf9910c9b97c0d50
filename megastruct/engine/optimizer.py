"""AdamW over groups of equal learning rate and decay, and the gradient norm where DeepSpeed does not compute it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import combine_grad_norm_groups
from torch import nn

from megastruct.config.schema import OptimizerConfig
from megastruct.layers.vocabulary import VocabParallelEmbedding, VocabParallelHead


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, device_type: str, base_width: int | None = None
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and none on vectors (norms, biases); fused on CUDA.

    Groups carry `lr_scale`, by which the loop's learning rate is multiplied: 1, or `learning_rate_scale` of the
    matrices where there is a `base_width`. What decays in a step does not depend on it, so that the time over which a
    weight is forgotten is that of the base width, too (Wang and Aitchison 2024, arXiv 2405.13698).
    """
    matrices: dict[float, list[nn.Parameter]] = {}
    vectors = [p for p in model.parameters() if p.ndim < 2]
    vocabulary = _vocabulary_weights(model)
    for p in model.parameters():
        if p.ndim >= 2:
            scale = 1.0 if base_width is None or p in vocabulary else learning_rate_scale(p, base_width)
            matrices.setdefault(scale, []).append(p)
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay / scale,  # AdamW multiplies it by the group's learning rate
            "name": "matrices",
            "lr_scale": scale,
        }
        for scale, parameters in sorted(matrices.items())
    ]
    groups.append({"params": vectors, "weight_decay": 0.0, "name": "vectors", "lr_scale": 1.0})
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=device_type == "cuda",
    )


def learning_rate_scale(matrix: nn.Parameter, base_width: int) -> float:
    """base_width / d_in for a matrix or factor [..., d_out, d_in] of a linear layer, d_in that of all its shards.

    Adam moves every entry by the learning rate, so a product over d_in inputs moves by d_in times that. Source: Qiu et
    al. 2024 (arXiv 2406.06248), section 3.2, factor by factor; for dense matrices Yang et al. 2022 (arXiv 2203.03466).
    """
    return base_width / getattr(matrix, "global_shape", matrix.shape)[-1]


def _vocabulary_weights(model: nn.Module) -> set[nn.Parameter]:
    """Embedding and output head: what they add up does not grow with the width, or is divided by it (`logit_scale`)."""
    layers = [m for m in model.modules() if isinstance(m, (VocabParallelEmbedding, VocabParallelHead))]
    return {layer.weight for layer in layers}


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
            if not getattr(p, "ds_pipe_replicated", False)
            and (counts_replicated or getattr(p, "tensor_model_parallel", False))
        ]
        self.norm = 0.0

    @torch.no_grad()
    def __call__(self, *_: Any) -> None:
        squares = [p.grad.float().square().sum() for p in self.counted if p.grad is not None]
        device = self.parameters[0].device
        # In float64, so that parameters without a gradient (guides that are skipped) do not move the last bit.
        total = torch.stack(squares).double().sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self.model_group)
        self.norm = float(total.sqrt())
        if not math.isfinite(self.norm):
            for p in self.parameters:
                p.grad = None  # AdamW passes over the parameter: weight, moments and their step stay as they are
        elif self.max_norm and self.norm > self.max_norm:
            for p in self.parameters:
                if p.grad is not None:
                    p.grad.mul_(self.max_norm / (self.norm + 1e-6))
