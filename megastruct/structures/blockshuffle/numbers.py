"""BlockShuffle(B), also called Monarch: y = f^-1(U_b f(V_b x)), both factors block-diagonal, with K = min(N, M).

fc1 gathers the K values per token between the factors, fc2 exchanges K / min(tp, B). Source: arXiv 2406.16450.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

from typing_extensions import override

from megastruct.errors import Problem
from megastruct.structures.numbers import Exchange, Form, Numbers, Sizes, Widths
from megastruct.structures.sizes import (
    NBLOCKS,
    block_problems,
    block_shard_problems,
    block_tile_warnings,
    divisors,
    inner_width_problems,
)


class BlockShuffleNumbers(Numbers):
    """The numbers of BlockShuffle(B); the size is the number of blocks B."""

    name = "blockshuffle"
    sizes: ClassVar = {"nblocks": NBLOCKS}
    formula = "`f⁻¹(U_b f(V_b x))`: both are block-diagonal with B blocks, with K = min(N, M) values between them"
    weights_formula = "`K (N + M) / B`"

    @override
    def factor_shapes(self, n: int, m: int, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        nblocks = sizes["nblocks"]
        k = min(n, m) // nblocks
        return {"v": (nblocks, k, n // nblocks), "u": (nblocks, m // nblocks, k)}

    @override
    def replicated_factors(self, form: Form) -> tuple[str, ...]:
        return ("v",) if form == "column" else ("u",)

    @override
    def inner_width(self, form: Form, n: int, m: int, sizes: Sizes) -> int:
        return min(n, m)

    @override
    def exchange(self, form: Form, n: int, m: int, tp_size: int, sizes: Sizes) -> Exchange:
        """A rank of the row form has whole blocks or shares one block: it sends the features of these blocks only."""
        k = min(n, m)
        if form == "column":
            return Exchange("all_gather", k)
        return Exchange("all_to_all", k // min(tp_size, sizes["nblocks"]))

    @override
    def size_problems(self, widths: Widths, given: Sizes) -> Iterator[Problem]:
        yield from block_problems(widths, self.name, given)

    @override
    def shard_problems(self, widths: Widths, given: Sizes) -> Iterator[Problem]:
        """In the column form every rank has a share of the outputs of every block."""
        blocks = list(block_shard_problems(widths, given))
        by_both = f"{widths.prefix}nblocks x {widths.tp_name} = {given['nblocks']} x {widths.tp}"
        yield from blocks or inner_width_problems(widths, given["nblocks"] * widths.tp, by_both)

    @override
    def nearest_sizes(self, widths: Widths, share: float, share_of: Callable[[Sizes], float], given: Sizes) -> Sizes:
        fitting = [{"nblocks": number} for number in divisors(widths.common_divisor)]
        return min(fitting, key=lambda sizes: abs(share_of(sizes) - share))

    @override
    def tile_warnings(self, widths: Widths, given: Sizes) -> Iterator[str]:
        yield from block_tile_warnings(widths, given, widths.outer)
