"""Cost of one linear map N -> M in each structure. Source: arXiv 2406.16450, table of section 2.

Every entry of a factor is used in exactly one multiply-add per token, so parameters and MACs per token are one number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


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
