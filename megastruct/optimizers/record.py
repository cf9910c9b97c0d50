"""What an optimizer is to all others: its keys in the config, its groups of parameters, and the state that it keeps.

Config, planner, engine, checkpoints and resume read this record; none of them knows an optimizer by name. It loads no
torch: only `build` and `begin` do, when they are called.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from megastruct.errors import Problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# matrix: a weight or factor of a linear map, also in blocks. vocabulary: embedding and output head. vector: norms and
# biases. guide: the dense weight beside a structured linear in self-guided training.
Role = Literal["matrix", "vocabulary", "vector", "guide"]
ROLES: tuple[Role, ...] = ("matrix", "vocabulary", "vector")  # a guide is a matrix where no group names guides
MASTER = "master"  # the fp32 weight, which checkpoints keep beside the optimizer's kinds of state
VALUE_BYTES = 4  # the state is kept in fp32
Value = bool | int | float | str | None
Precision = Literal["fp32", "bf16"]
_KINDS: dict[type, str] = {bool: "truth value", int: "whole number", float: "number"}


@dataclass(frozen=True)
class Key:
    """A key of the config's `optimizer` section: its default, whose type it has, and its bounds.

    Default None: a number that may be left out. `at_least` is a value that is allowed, `above` and `below` are not.
    `choices`: the names that a key for text has to choose from.
    """

    default: Value
    description: str
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError if a default for text is none of the choices."""
        if isinstance(self.default, str) and self.default not in self.choices:
            raise ValueError(f"{self.default!r} is none of the choices {self.choices}")

    @property
    def kind(self) -> type:
        """The type of its values: bool, int, float or str."""
        return float if self.default is None else type(self.default)

    def problem(self, where: str, value: Value) -> Problem | None:
        """What is wrong with a value, if anything is."""
        if value is None and self.default is None:
            return None
        if self.choices:
            if value in self.choices:
                return None
            meant = next(iter(difflib.get_close_matches(str(value), self.choices, n=1)), self.default)
            return Problem(where, f"{value!r} is none of {', '.join(map(repr, self.choices))}", f"{where}={meant}")
        if isinstance(value, bool | int | float) and self._fits(value):
            return None
        words = {"at least": self.at_least, "above": self.above, "below": self.below}
        bounds = " and ".join(f"{word} {bound:g}" for word, bound in words.items() if bound is not None)
        default = "null" if self.default is None else str(self.default).lower()
        return Problem(where, f"{value!r} is no {_KINDS[self.kind]} {bounds}".rstrip(), f"{where}={default}")

    def _fits(self, value: bool | int | float) -> bool:
        of_type = type(value) is self.kind or (self.kind is float and type(value) is int)
        return of_type and math.isfinite(value) and self._is_within(value)

    def _is_within(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


@dataclass(frozen=True)
class Group:
    """Parameters that the optimizer treats alike.

    `roles`: those of its parameters. `state`: the kinds of state that it keeps of each, tensors of the parameter's size
    in fp32, named as in the optimizer's own `state` and in checkpoints. `decays`: whether weight decay applies.
    `whole`: a step needs whole matrices, not the parts of them that a rank owns (`ownership.py`).
    """

    name: str
    roles: tuple[Role, ...]
    state: tuple[str, ...]
    decays: bool = True
    whole: bool = False


class Optimizer(ABC):
    """One optimizer. Its torch half is any `torch.optim.Optimizer`; under ZeRO it steps flat parts of parameters.

    When its `step` is called, every gradient is final: summed over all ranks, and clipped.

    Attributes:
        name: as in the config's `optimizer.kind`.
        keys: the keys of the config's `optimizer` section that it has of its own.
        groups: every role is in one of them. Parameters are grouped in this order.
    """

    name: ClassVar[str]
    keys: ClassVar[Mapping[str, Key]]
    groups: ClassVar[tuple[Group, ...]]

    @abstractmethod
    def build(
        self, groups: list[dict[str, Any]], settings: Mapping[str, Any], device_type: str, precision: Precision
    ) -> torch.optim.Optimizer:
        """The optimizer over parameter groups with `params`, `lr`, `weight_decay`, `lr_scale`, the group's `name` and
        the `group_options`.

        `settings`: the values of `keys`. `device_type`: "cpu" or "cuda". `precision`: that of the training; what the
        optimizer steps is fp32 in both. With groups that are `whole`, the optimizer has an attribute `exchange`, which
        the engine sets to a `WholeMatrices`.
        """

    @abstractmethod
    def begin(self, group: Mapping[str, Any], tensor: Tensor, step: int) -> dict[str, Any]:
        """The optimizer's state of a tensor of `group` after `step` steps, with zeros for the group's kinds of state.

        `group`: of the built optimizer. A checkpoint fills in the zeros.
        """

    def learning_rate_scale(self, role: Role, fan_out: int, fan_in: int, base_width: int) -> float | None:
        """The factor of the learning rate for a matrix or guide [..., fan_out, fan_in], if the learning rate is set for
        a square matrix of width `base_width`.

        None: no rule is known, and `model.base_width` is refused.
        """
        return None

    def group_options(self, role: Role, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Further options of the parameter groups with parameters of this role, such as AdamW's `betas`.

        Parameters of one group of the record whose options differ are given to `build` in groups of their own. The
        values are hashable.
        """
        return {}

    def group_learning_rate_scale(self, group: Group, settings: Mapping[str, Any]) -> float:
        """The factor of the config's learning rate for all of a group, given the values of its keys."""
        return 1.0

    def step_flops(self, shape: Sequence[int], settings: Mapping[str, Any]) -> int:
        """FLOPs of the matrix products of a step on a parameter [..., m, n] of a group that is `whole`."""
        return 0

    def group_of(self, role: Role) -> Group:
        """The one group whose parameters have this role; that of matrices for guides, unless one names them."""
        return next((group for group in self.groups if role in group.roles), None) or self.group_of("matrix")

    @property
    def state(self) -> tuple[str, ...]:
        """All kinds of state that any of its groups keeps."""
        return tuple(dict.fromkeys(kind for group in self.groups for kind in group.state))

    def bytes_per_parameter(self, role: Role, with_master: bool) -> int:
        """What is kept of a parameter: the kinds of state, and with ZeRO the master as well."""
        return VALUE_BYTES * (len(self.group_of(role).state) + with_master)

    def settings(self, given: Mapping[str, Value]) -> dict[str, Value]:
        """The values of its keys: as given, or the default."""
        return {key: given.get(key, description.default) for key, description in self.keys.items()}

    def problems(self, prefix: str, given: Mapping[str, Value]) -> Iterator[Problem]:
        """What is wrong with given values of its own keys; `prefix` stands before a key in messages."""
        for key, value in given.items():
            if key in self.keys and (problem := self.keys[key].problem(f"{prefix}{key}", value)):
                yield problem
