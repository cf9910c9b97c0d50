"""The activations that a feed-forward network may have. Config, model and memory plan read this registry.

Numbers stand here, without torch; the function is loaded when a model is built. docs/extending.md adds one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """`name` as in `model.activation`; `function`: "module:name" of what maps fc1's outputs to fc2's inputs.

    A gated activation maps [..., 2f] to [..., f], with gate i at feature 2i and value i at feature 2i + 1: every even
    slice of fc1's outputs holds whole pairs. Any other maps [..., f] to [..., f]. `kept_values`: how many values per
    feature of f the backward keeps besides fc1's outputs.
    """

    name: str
    function: str
    gated: bool = False
    kept_values: int = 1

    @property
    def fc1_width(self) -> int:
        """Outputs of fc1 per feature of f."""
        return 2 if self.gated else 1

    def load(self) -> Callable[[Tensor], Tensor]:
        """The function itself."""
        module, _, name = self.function.partition(":")
        return getattr(import_module(module), name)


ACTIVATIONS: dict[str, Activation] = {}


def register_activation(activation: Activation) -> None:
    """Add an activation. Raises ValueError if its name is taken by another."""
    if ACTIVATIONS.setdefault(activation.name, activation) != activation:
        raise ValueError(f"activation {activation.name!r} is registered already: {ACTIVATIONS[activation.name]}")


register_activation(Activation("gelu", "megastruct.layers.activations:gelu"))
register_activation(Activation("swiglu", "megastruct.layers.activations:swiglu", gated=True, kept_values=2))
