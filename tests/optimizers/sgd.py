"""An optimizer of its own: SGD with momentum, as a record beside AdamW's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from megastruct.optimizers import Group, Key, Optimizer, Precision


class SGD(Optimizer):
    """v = momentum v + g, w = w - lr v. Source: torch.optim.SGD."""

    name = "sgd"
    keys: ClassVar = {"momentum": Key(0.9, "decay of the velocity", at_least=0, below=1)}
    groups: ClassVar = (
        Group("matrices", ("matrix", "vocabulary"), ("momentum_buffer",)),
        Group("vectors", ("vector",), ("momentum_buffer",), decays=False),
    )

    def build(
        self, groups: list[dict[str, Any]], settings: Mapping[str, Any], device_type: str, precision: Precision
    ) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, momentum=settings["momentum"])

    def begin(self, group: Mapping[str, Any], tensor: Tensor, step: int) -> dict[str, Any]:
        return {"momentum_buffer": torch.zeros_like(tensor)}
