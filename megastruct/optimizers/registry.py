"""The optimizers that there are. Config, planner, engine, checkpoints and tests all read this registry.

Optimizers of other installed packages are found by the entry-point group `megastruct.optimizers`, each an `Optimizer`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.metadata import entry_points
from types import MappingProxyType

from megastruct.optimizers.adamw import AdamW
from megastruct.optimizers.muon import Muon
from megastruct.optimizers.record import MASTER, ROLES, Optimizer

ENTRY_POINTS = "megastruct.optimizers"
ADAMW = AdamW.name
_ATTRIBUTES = ("name", "keys", "groups")
_optimizers: dict[str, Optimizer] = {}
OPTIMIZERS: Mapping[str, Optimizer] = MappingProxyType(_optimizers)


def register(optimizer: Optimizer) -> None:
    """Add an optimizer.

    Raises TypeError with the name of what it lacks, ValueError if it contradicts itself or its name is taken.
    """
    if missing := [name for name in _ATTRIBUTES if not hasattr(optimizer, name)]:
        raise TypeError(f"{type(optimizer).__name__} lacks {', '.join(missing)}")
    for role in ROLES:
        if (count := sum(role in group.roles for group in optimizer.groups)) != 1:
            raise ValueError(f"optimizer {optimizer.name!r} has {count} groups for the role {role!r}, not 1")
    for kind in optimizer.state:
        if kind == MASTER or not kind.isidentifier():
            raise ValueError(f"optimizer {optimizer.name!r}: {kind!r} cannot be the name of a kind of state")
    if _optimizers.setdefault(optimizer.name, optimizer) is not optimizer:
        raise ValueError(f"optimizer {optimizer.name!r} is registered already, by {_optimizers[optimizer.name]}")


def nearest_optimizer(name: str) -> str:
    """The optimizer that was probably meant."""
    return next(iter(difflib.get_close_matches(name, OPTIMIZERS, n=1, cutoff=0.0)), ADAMW)


def _register_all() -> None:
    register(AdamW())
    register(Muon())
    for entry_point in sorted(entry_points(group=ENTRY_POINTS), key=lambda found: found.name):
        register(entry_point.load())


_register_all()
