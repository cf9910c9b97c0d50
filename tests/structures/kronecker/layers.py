"""The layers of Kronecker(k). Letters as in `megastruct/structures/lowrank/layers.py`."""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor, nn

from kronecker import maths
from kronecker.numbers import KroneckerNumbers
from megastruct.parallel.collectives import gather_sequence, reduce_scatter_sequence
from megastruct.parallel.seeds import Names, draw_normal
from megastruct.parallel.shards import ShardSpec
from megastruct.structures.layers import Layers
from megastruct.structures.linear import StructuredLinear
from megastruct.structures.sharded import ShardedLinear


class KroneckerLinear(StructuredLinear):
    """a [M/k, N/k], b [k, k], bias [M]. Starts with a normal draw times the identity."""

    numbers = KroneckerNumbers()
    maths: ClassVar[ModuleType] = maths

    def draw_factors(self, std: float, names: Names) -> dict[str, Tensor]:
        return {"a": draw_normal(tuple(self.a.shape), std, (*names, "a")), "b": torch.eye(self.sizes["order"])}


class KroneckerColumnLinear(ShardedLinear):
    """fc1: b replicated, applied to own tokens; a [M/k/tp, N/k] and bias [M/tp] the rank's rows."""

    linear, form = KroneckerLinear, "column"
    a: nn.Parameter
    b: nn.Parameter

    def factor_specs(self, tp_size: int) -> dict[str, ShardSpec]:
        return {"a": ShardSpec.along(0, tp_size)}

    def forward_sharded(self, x: Tensor) -> Tensor:
        """Map x [s/tp, b, N] to [s, b, M/tp]."""
        hidden = gather_sequence(maths.small_product(x, self.replicated(self.b)), self.tp)
        y = maths.large_product(hidden, self.a, self.sizes["order"])
        return y if self.bias is None else y + self.bias


class KroneckerRowLinear(ShardedLinear):
    """fc2: a [M/k, N/k/tp] the rank's columns; b and bias [M] replicated, applied to own tokens."""

    linear, form = KroneckerLinear, "row"
    a: nn.Parameter
    b: nn.Parameter

    def factor_specs(self, tp_size: int) -> dict[str, ShardSpec]:
        return {"a": ShardSpec.along(1, tp_size)}

    def forward_sharded(self, x: Tensor) -> Tensor:
        """Map x [s, b, N/tp] to [s/tp, b, M]."""
        hidden = reduce_scatter_sequence(maths.large_product(x, self.a, self.sizes["order"]), self.tp)
        y = maths.small_product(hidden, self.replicated(self.b))
        bias = self.replicated_bias()
        return y if bias is None else y + bias


LAYERS = Layers(maths, KroneckerLinear, KroneckerColumnLinear, KroneckerRowLinear)
