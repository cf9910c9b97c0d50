"""The torch half of a structure: its mathematics and its three layers. What is missing is refused at import."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from megastruct.structures.linear import StructuredLinear
from megastruct.structures.sharded import ShardedLayer

# Functions of a structure's `maths.py`; `factors` are its parameters, in the order of `Numbers.factor_shapes`.
#   apply(x, *factors, bias)             x [..., N] -> [..., M]: what trains, on one process; kernels are chosen here
#   apply_reference(x, *factors, bias)   the same map written as its sums, for tests
#   to_dense(*factors)                   the equal dense weight [M, N]: for guides, merging, export and tests
FUNCTIONS = ("apply", "apply_reference", "to_dense")


@dataclass(frozen=True)
class Layers:
    """`linear` is the layer of one process. `column` and `row` share it over tensor-parallel ranks (`numbers.Form`);
    they are called with (in_features, out_features, tp=, bias=, init_std=, and the structure's sizes)."""

    maths: ModuleType
    linear: type[StructuredLinear]
    column: type[ShardedLayer]
    row: type[ShardedLayer]

    def __post_init__(self) -> None:
        """Raises TypeError with the name of what is missing."""
        if missing := [name for name in FUNCTIONS if not hasattr(self.maths, name)]:
            raise TypeError(f"{self.maths.__name__} lacks {', '.join(missing)}")
        for role, wanted in (("linear", StructuredLinear), ("column", ShardedLayer), ("row", ShardedLayer)):
            if not issubclass(getattr(self, role), wanted):
                raise TypeError(f"{role} = {getattr(self, role).__name__} is no {wanted.__name__}")
