"""The torch half of a structure: its mathematics and its three layers. An incomplete one is refused at import."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from megastruct.structures.linear import StructuredLinear
from megastruct.structures.sharded import ShardedLinear

# Functions of a structure's `maths.py`; `factors` are its parameters, in the order of `Numbers.factor_shapes`.
#   apply(x, *factors, bias)             x [..., N] -> [..., M]: used for training on one process; kernels go here
#   apply_reference(x, *factors, bias)   the same map written out as sums, for tests
#   to_dense(*factors)                   the equal dense weight [M, N]: for guides, merging, export and tests
# A structure may also have
#   project(weight, **sizes)             the factors nearest to a dense weight [M, N]: for importing dense models
FUNCTIONS = ("apply", "apply_reference", "to_dense")


@dataclass(frozen=True)
class Layers:
    """The mathematics and the layers of one structure.

    `linear` is the layer of one process. `column` and `row` are the two forms (`numbers.Form`) of it over
    tensor-parallel ranks. They are called with in_features, out_features, tp=, bias=, init_std= and the structure's
    sizes.
    """

    maths: ModuleType
    linear: type[StructuredLinear]
    column: type[ShardedLinear]
    row: type[ShardedLinear]

    def __post_init__(self) -> None:
        """Raise TypeError with the name of what is missing."""
        if missing := [name for name in FUNCTIONS if not hasattr(self.maths, name)]:
            raise TypeError(f"{self.maths.__name__} lacks {', '.join(missing)}")
        for role, wanted in (("linear", StructuredLinear), ("column", ShardedLinear), ("row", ShardedLinear)):
            if not issubclass(getattr(self, role), wanted):
                raise TypeError(f"{role} = {getattr(self, role).__name__} is not a subclass of {wanted.__name__}")
