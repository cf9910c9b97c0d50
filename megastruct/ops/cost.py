"""Cost of one linear map N -> M in each structure, alone and over the ranks of a tensor-parallel group.

Every entry of a factor is used in exactly one multiply-add per token, so parameters and MACs per token are one number.
Source: arXiv 2406.16450, table of section 2; what is sharded and sent: docs/tensor_parallelism.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal


def dense_weights(n: int, m: int) -> int:
    return n * m


def lowrank_weights(n: int, m: int, rank: int) -> int:
    return rank * (n + m)


def blockdense_weights(n: int, m: int, nblocks: int, rank: int) -> int:
    return rank * (n // nblocks + m)


def blockshuffle_weights(n: int, m: int, nblocks: int) -> int:
    return min(n, m) * (n + m) // nblocks


def dense_width(n: int, m: int) -> int:
    return 0


def factored_width(n: int, m: int, rank: int, nblocks: int = 1) -> int:
    return rank


def blockshuffle_width(n: int, m: int, nblocks: int) -> int:
    return min(n, m)


@dataclass(frozen=True)
class Structure:
    """What there is to know of a structure without its mathematics.

    `sizes` are the keys of the config's `ffn` section that it needs; they are handed to `weights` (parameters of a map
    N -> M), to `inner_width` (values per token between its two factors) and to the layer's constructor by name.
    """

    sizes: tuple[str, ...]
    weights: Callable[..., int]
    inner_width: Callable[..., int]


STRUCTURES: dict[str, Structure] = {
    "dense": Structure((), dense_weights, dense_width),
    "lowrank": Structure(("rank",), lowrank_weights, factored_width),
    "blockdense": Structure(("nblocks", "rank"), blockdense_weights, factored_width),
    "blockshuffle": Structure(("nblocks",), blockshuffle_weights, blockshuffle_width),
}


@dataclass(frozen=True)
class LinearMap:
    """One linear map N -> M of an FFN: "column" into the features that are sharded (fc1), "row" out of them (fc2).

    `sizes`: those of its structure, as in `STRUCTURES`.
    """

    structure: str
    form: Literal["column", "row"]
    n: int
    m: int
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        return STRUCTURES[self.structure].weights(self.n, self.m, **self.sizes)

    @property
    def inner_width(self) -> int:
        return STRUCTURES[self.structure].inner_width(self.n, self.m, **self.sizes)

    @property
    def replicated_weights(self) -> int:
        """Entries that every rank has: of a column map the first factor, of a row map the second; a dense map is
        sharded as a whole."""
        if not self.inner_width:
            return 0
        first = self.inner_width * self.n // self.sizes.get("nblocks", 1)
        return first if self.form == "column" else self.weights - first

    def exchange(self, tp_size: int) -> tuple[str, int]:
        """The forward's collective, and its width c: per token of the sequence each rank sends (tp-1)/tp c values.

        The backward sends as many, with the adjoint collective.
        """
        outer_width = self.n if self.form == "column" else self.m
        width = self.inner_width or outer_width
        if self.form == "column":
            return "all_gather", width
        if "nblocks" not in self.sizes:
            return "reduce_scatter", width
        return "all_to_all", width // min(tp_size, self.sizes["nblocks"])
