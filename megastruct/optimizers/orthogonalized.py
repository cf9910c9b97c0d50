"""Muon's torch half: momentum whose matrices are orthogonalised, and AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megastruct.optimizers.ownership import WholeMatrices


def each_alone(
    values: Mapping[Tensor, Tensor], function: Callable[[Tensor], Tensor]
) -> Iterator[tuple[Tensor, int, Tensor]]:
    """`WholeMatrices` where the stepped tensors are the matrices themselves, on one rank."""
    for tensor, value in values.items():
        yield tensor, 0, function(value.view(1, *tensor.shape)).reshape(-1)


class OrthogonalizedMomentum(torch.optim.Optimizer):
    """Groups named in `orthogonalized` step by the orthogonalised momentum of whole matrices; AdamW steps the others.

    DeepSpeed decides by the class of an optimizer, and by names in it, whether to run Muon of its own: this name has
    none of them. AdamW is an object of its own with these groups and this state, because a subclass that calls its
    `step` would run the hooks of a step twice.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        orthogonalized: frozenset[str],
        orthogonalize: Callable[[Tensor], Tensor],
        momentum: float,
        nesterov: bool,
        adamw: Callable[[list[dict[str, Any]]], torch.optim.AdamW],
    ) -> None:
        """`orthogonalize`: from [b, ..., m, n] to the updates for learning rate 1. `adamw`: makes it for groups."""
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.orthogonalized, self.orthogonalize = orthogonalized, orthogonalize
        self.momentum, self.nesterov = momentum, nesterov
        self.exchange: WholeMatrices = each_alone
        others = [group for group in self.param_groups if group["name"] not in orthogonalized]
        self.adamw = adamw(others) if others else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient, which is overwritten. Collective over the stage's ranks."""
        self._step_others()
        groups: dict[Tensor, dict[str, Any]] = {}
        for group in self.param_groups:
            if group["name"] in self.orthogonalized:
                groups |= {tensor: group for tensor in group["params"] if tensor.grad is not None}
        values = {tensor: self._advance(tensor) for tensor in groups}
        for tensor, group in groups.items():
            tensor.mul_(1 - group["lr"] * group["weight_decay"])
        for tensor, start, update in self.exchange(values, self.orthogonalize):
            tensor.view(-1)[start : start + len(update)].add_(update, alpha=-groups[tensor]["lr"])

    def _step_others(self) -> None:
        if self.adamw is not None:
            # Both are looked up in each step: ZeRO puts its flat tensors in the groups, a resume other states.
            self.adamw.param_groups = [g for g in self.param_groups if g["name"] not in self.orthogonalized]
            self.adamw.state = self.state
            self.adamw.step()

    def _advance(self, tensor: Tensor) -> Tensor:
        """Take the gradient into the momentum; returns what is to be orthogonalised."""
        gradient, state = tensor.grad, self.state[tensor]
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(tensor)
        momentum: Tensor = state["momentum"]
        momentum.mul_(self.momentum).add_(gradient)
        return gradient.add_(momentum, alpha=self.momentum) if self.nesterov else momentum
