"""The optimizer of a model: its parameters by role, in groups of equal learning rate and decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megastruct.config.schema import OptimizerConfig
from megastruct.layers.vocabulary import VocabParallelEmbedding, VocabParallelHead
from megastruct.optimizers import OPTIMIZERS, Role


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, device_type: str, base_width: int | None = None
) -> torch.optim.Optimizer:
    """The config's optimizer over the groups of its record, with weight decay where the group has it.

    Groups carry `lr_scale`, by which the loop's learning rate is multiplied: 1, or the record's `learning_rate_scale`
    of the matrices where there is a `base_width`. What decays in a step does not depend on it, so that the time over
    which a weight is forgotten is that of the base width, too (Wang and Aitchison 2024, arXiv 2405.13698).
    """
    record, roles = OPTIMIZERS[config.kind], parameter_roles(model)
    groups: list[dict[str, Any]] = []
    for group in record.groups:
        by_scale: dict[float, list[nn.Parameter]] = {}
        for parameter in model.parameters():
            if roles[parameter] in group.roles:
                scale = _learning_rate_scale(config.kind, parameter, roles[parameter], base_width)
                by_scale.setdefault(scale, []).append(parameter)
        groups += [
            {
                "params": parameters,
                "lr": config.learning_rate,
                # The optimizer multiplies it by the group's learning rate.
                "weight_decay": config.weight_decay / scale if group.decays else 0.0,
                "name": group.name,
                "lr_scale": scale,
            }
            for scale, parameters in sorted(by_scale.items())
        ]
    return record.build(groups, config.settings, device_type)


def parameter_roles(model: nn.Module) -> dict[nn.Parameter, Role]:
    """What each parameter is to an optimizer.

    Embedding and output head are a role of their own: what they add up does not grow with the width, or is divided by
    it (`logit_scale`).
    """
    layers = [m for m in model.modules() if isinstance(m, (VocabParallelEmbedding, VocabParallelHead))]
    vocabulary = {layer.weight for layer in layers}
    return {p: "vocabulary" if p in vocabulary else "vector" if p.ndim < 2 else "matrix" for p in model.parameters()}


def _learning_rate_scale(kind: str, parameter: nn.Parameter, role: Role, base_width: int | None) -> float:
    """For a matrix or factor [..., d_out, d_in], by the d_in of all its shards."""
    if base_width is None or role != "matrix":
        return 1.0
    scale = OPTIMIZERS[kind].learning_rate_scale(getattr(parameter, "global_shape", parameter.shape)[-1], base_width)
    assert scale is not None, "the config's checks refuse base_width for such an optimizer"
    return scale
