"""The optimizer of a model: its parameters by role, in groups that are treated alike."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from megastruct.config.schema import Config
from megastruct.layers.vocabulary import VocabParallelEmbedding, VocabParallelHead
from megastruct.optimizers import OPTIMIZERS, Optimizer, Role
from megastruct.structures import DENSE
from megastruct.structures.guide import ColumnGuide, RowGuide
from megastruct.structures.sharded import ShardedLinear


class Treatment(NamedTuple):
    """What parameters of one group of the record may differ in; those that agree in all of it are stepped together.

    The learning rate is multiplied by both scales. `options`: the record's `group_options`.
    """

    width_scale: float
    factor_scale: float
    weight_decay: float
    options: tuple[tuple[str, Any], ...]


def build_optimizer(model: nn.Module, config: Config, device_type: str) -> torch.optim.Optimizer:
    """The config's optimizer over the groups of its record, each divided by `Treatment`.

    Groups carry `lr_scale`, by which the loop's learning rate is multiplied: the record's `group_learning_rate_scale`,
    for matrices its `learning_rate_scale` where there is a `model.base_width`, and for the factors of structured
    linears the config's. What decays in a step does not depend on the second, so that the time over which a weight is
    forgotten is that of the base width, too (Wang and Aitchison 2024, arXiv 2405.13698).

    Raises TypeError if DeepSpeed would take the optimizer for its own Muon.
    """
    record, roles, factors = OPTIMIZERS[config.optimizer.kind], parameter_roles(model), structured_factors(model)
    groups: list[dict[str, Any]] = []
    for group in record.groups:
        members: dict[Treatment, list[nn.Parameter]] = {}
        for parameter in model.parameters():
            if record.group_of(role := roles[parameter]) == group:
                treatment = _treatment(config, record, parameter, role, parameter in factors)
                members.setdefault(treatment, []).append(parameter)
        own = record.group_learning_rate_scale(group, config.optimizer.settings)
        groups += [
            {
                "params": parameters,
                "lr": config.optimizer.learning_rate,
                # The optimizer multiplies it by the group's learning rate.
                "weight_decay": treatment.weight_decay / treatment.width_scale,
                "name": group.name,
                "lr_scale": own * treatment.width_scale * treatment.factor_scale,
                **dict(treatment.options),
            }
            for treatment, parameters in sorted(members.items(), key=lambda item: item[0].width_scale)
        ]
    optimizer = record.build(groups, config.optimizer.settings, device_type, config.training.precision)
    _refuse_deepspeeds_muon(optimizer, model)
    return optimizer


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


def structured_factors(model: nn.Module) -> set[Any]:
    """The factors of the linears that are not dense."""
    linears = [layer for layer in model.modules() if isinstance(layer, ShardedLinear)]
    return {factor for linear in linears if linear.linear.numbers.name != DENSE for factor in linear.factors()}


def _weights(model: nn.Module, *layers: type[nn.Module]) -> set[Any]:
    return {layer.weight for layer in model.modules() if isinstance(layer, layers)}


def _treatment(config: Config, record: Optimizer, parameter: nn.Parameter, role: Role, is_factor: bool) -> Treatment:
    keys = config.optimizer
    return Treatment(
        width_scale=_learning_rate_scale(record, parameter, role, config.model.base_width),
        factor_scale=keys.factor_learning_rate_scale if is_factor else 1.0,
        weight_decay=keys.decay_of(role) if record.group_of(role).decays else 0.0,
        options=tuple(record.group_options(role, keys.settings).items()),
    )


def _learning_rate_scale(record: Optimizer, parameter: nn.Parameter, role: Role, base_width: int | None) -> float:
    """For a matrix, factor or guide [..., d_out, d_in], by the sizes of all its shards together."""
    if base_width is None or role not in ("matrix", "guide"):
        return 1.0
    *_, fan_out, fan_in = getattr(parameter, "global_shape", parameter.shape)
    scale = record.learning_rate_scale(role, fan_out, fan_in, base_width)
    assert scale is not None, "the config's checks refuse base_width for such an optimizer"
    return scale


def _refuse_deepspeeds_muon(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """DeepSpeed replaces the gradients of such an optimizer by updates of its own Muon, before it clips them."""
    classes = [base for base in type(optimizer).__mro__ if "muon" in base.__name__.lower()]
    is_marked = any(hasattr(parameter, "use_muon") for parameter in model.parameters())
    if any(base.__module__.startswith("deepspeed.") for base in classes) or (classes and is_marked):
        raise TypeError(
            f"DeepSpeed runs a Muon of its own for {classes[0].__name__}, which is wrong with clipping and tensor "
            "parallelism: build an optimizer whose class has another name, and set no use_muon on parameters"
        )
