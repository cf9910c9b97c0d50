"""The registry of structures. Config, planner, layers, checks, documentation and tests all read it.

A structure is a folder with numbers (no torch), mathematics and layers. Its `__init__.py` makes a `Structure`, which is
passed to `register`. The torch half is loaded when a layer is first needed. Structures of other installed packages are
found through the entry-point group `megastruct.structures`; each entry point names a `Structure`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING

from megastruct.structures.numbers import Form, LinearMap, Numbers, Sizes

if TYPE_CHECKING:
    from megastruct.structures.layers import Layers

ENTRY_POINTS = "megastruct.structures"
DENSE = "dense"
_ATTRIBUTES = ("name", "sizes", "formula", "weights_formula")
_structures: dict[str, Structure] = {}
STRUCTURES: Mapping[str, Structure] = MappingProxyType(_structures)


@dataclass(frozen=True)
class Structure:
    """A structure: its numbers, and the module whose `LAYERS` is the torch half (`structures/layers.py`)."""

    numbers: Numbers
    layers_module: str

    @property
    def name(self) -> str:
        """The value of the config's `ffn.structure`."""
        return self.numbers.name

    @cached_property
    def layers(self) -> Layers:
        """The torch half. Raises TypeError if the module has no `LAYERS`."""
        from megastruct.structures.layers import Layers

        found = getattr(import_module(self.layers_module), "LAYERS", None)
        if not isinstance(found, Layers):
            raise TypeError(f"{self.layers_module} has no LAYERS, a megastruct.structures.layers.Layers")
        return found

    def linear_map(self, form: Form, n: int, m: int, sizes: Sizes) -> LinearMap:
        """The map of `n` inputs to `m` outputs in this form."""
        return LinearMap(self.numbers, form, n, m, sizes)


def register(structure: Structure) -> None:
    """Add a structure. Raises TypeError that names what it lacks, and ValueError if its name is taken."""
    numbers = structure.numbers
    if missing := [name for name in _ATTRIBUTES if not hasattr(numbers, name)]:
        raise TypeError(f"{type(numbers).__name__} lacks {', '.join(missing)}")
    if not _exists(structure.layers_module):
        raise TypeError(f"structure {numbers.name!r}: there is no module {structure.layers_module}")
    if _structures.setdefault(numbers.name, structure) != structure:
        raise ValueError(f"structure {numbers.name!r} is registered already, by {_structures[numbers.name]}")


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that should contain it
        return False


def known_sizes() -> dict[str, str]:
    """The description of every size that any structure has, by config key."""
    return {key: text for structure in STRUCTURES.values() for key, text in structure.numbers.sizes.items()}


def nearest_name(name: str) -> str:
    """The name of the structure that was probably meant."""
    return next(iter(difflib.get_close_matches(name, STRUCTURES, n=1, cutoff=0.0)), DENSE)


def _register_all() -> None:
    for name in (DENSE, "lowrank", "blockdense", "blockshuffle"):
        register(import_module(f"megastruct.structures.{name}").STRUCTURE)
    for entry_point in sorted(entry_points(group=ENTRY_POINTS), key=lambda found: found.name):
        register(entry_point.load())
