"""The optimizer of a model: its parameters by role, in groups of equal learning rate and decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megastruct.config.schema import OptimizerConfig
from megastruct.layers.vocabulary import VocabParallelEmbedding, VocabParallelHead
from megastruct.optimizers import OPTIMIZERS, Optimizer, Role
from megastruct.structures.guide import ColumnGuide, RowGuide


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, device_type: str, base_width: int | None = None
) -> torch.optim.Optimizer:
    """The config's optimizer over the groups of its record, with weight decay where the group has it.

    Groups carry `lr_scale`, by which the loop's learning rate is multiplied: the record's `group_learning_rate_scale`,
    and for matrices its `learning_rate_scale` where there is a `base_width`. What decays in a step does not depend on
    the latter, so that the time over which a weight is forgotten is that of the base width, too (Wang and Aitchison
    2024, arXiv 2405.13698).
    """
    record, roles = OPTIMIZERS[config.kind], parameter_roles(model)
    groups: list[dict[str, Any]] = []
    for group in record.groups:
        by_scale: dict[float, list[nn.Parameter]] = {}
        for parameter in model.parameters():
            if record.group_of(roles[parameter]) == group:
                scale = _learning_rate_scale(record, parameter, roles[parameter], base_width)
                by_scale.setdefault(scale, []).append(parameter)
        own = record.group_learning_rate_scale(group, config.settings)
        groups += [
            {
                "params": parameters,
                "lr": config.learning_rate,
                # The optimizer multiplies it by the group's learning rate.
                "weight_decay": config.weight_decay / scale if group.decays else 0.0,
                "name": group.name,
                "lr_scale": own * scale,
            }
            for scale, parameters in sorted(by_scale.items())
        ]
    return record.build(groups, config.settings, device_type)


def parameter_roles(model: nn.Module) -> dict[nn.Parameter, Role]:
    """What each parameter is to an optimizer.

    Embedding and output head are a role of their own: what they add up does not grow with the width, or is divided by
    it (`logit_scale`).
    """
    vocabulary = _weights(model, VocabParallelEmbedding, VocabParallelHead)
    guides = _weights(model, ColumnGuide, RowGuide)

    def role(parameter: nn.Parameter) -> Role:
        if parameter in vocabulary:
            return "vocabulary"
        return "guide" if parameter in guides else "vector" if parameter.ndim < 2 else "matrix"

    return {parameter: role(parameter) for parameter in model.parameters()}


def _weights(model: nn.Module, *layers: type[nn.Module]) -> set[Any]:
    return {layer.weight for layer in model.modules() if isinstance(layer, layers)}


def _learning_rate_scale(record: Optimizer, parameter: nn.Parameter, role: Role, base_width: int | None) -> float:
    """For a matrix, factor or guide [..., d_out, d_in], by the sizes of all its shards together."""
    if base_width is None or role not in ("matrix", "guide"):
        return 1.0
    *_, fan_out, fan_in = getattr(parameter, "global_shape", parameter.shape)
    scale = record.learning_rate_scale(role, fan_out, fan_in, base_width)
    assert scale is not None, "the config's checks refuse base_width for such an optimizer"
    return scale
