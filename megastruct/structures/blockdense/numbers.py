"""BlockDense(B, R): y = U (V_b x), V_b block-diagonal. fc1 gathers R values per token, fc2 exchanges R / min(tp, B).

Source: arXiv 2406.16450.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

from typing_extensions import override

from megastruct.errors import Problem
from megastruct.parallel.sizes import divisors
from megastruct.structures.numbers import Exchange, Form, Numbers, Sizes, Widths
from megastruct.structures.sizes import (
    NBLOCKS,
    RANK,
    USUAL_BLOCKS,
    block_problems,
    block_shard_problems,
    block_tile_warnings,
    fitting_blocks,
    inner_width_problems,
    nearest_rank,
    rank_problems,
    rank_tile_warnings,
)


class BlockDenseNumbers(Numbers):
    """The numbers of BlockDense(B, R); the sizes are the number of blocks B and the rank R."""

    name = "blockdense"
    sizes: ClassVar = {"rank": RANK, "nblocks": NBLOCKS}
    formula = "`U (V_b x)`: V_b is block-diagonal with B blocks of R/B × N/B, U is M × R"
    weights_formula = "`R (N/B + M)`"

    @override
    def factor_shapes(self, n: int, m: int, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        nblocks, rank = sizes["nblocks"], sizes["rank"]
        return {"v": (nblocks, rank // nblocks, n // nblocks), "u": (m, rank)}

    @override
    def replicated_factors(self, form: Form) -> tuple[str, ...]:
        return ("v",) if form == "column" else ("u",)

    @override
    def inner_width(self, form: Form, n: int, m: int, sizes: Sizes) -> int:
        return sizes["rank"]

    @override
    def exchange(self, form: Form, n: int, m: int, tp_size: int, sizes: Sizes) -> Exchange:
        """A rank of the row form has whole blocks or shares one block: it sends the features of these blocks only."""
        rank, nblocks = sizes["rank"], sizes["nblocks"]
        if form == "column":
            return Exchange("all_gather", rank)
        return Exchange("all_to_all", rank // min(tp_size, nblocks))

    @override
    def size_problems(self, widths: Widths, given: Sizes) -> Iterator[Problem]:
        yield from block_problems(widths, self.name, given)
        yield from rank_problems(widths, self.name, given, fitting_blocks(widths, given))

    @override
    def shard_problems(self, widths: Widths, given: Sizes) -> Iterator[Problem]:
        blocks = list(block_shard_problems(widths, given))
        yield from blocks or inner_width_problems(widths, widths.tp, f"{widths.tp_name} = {widths.tp}")

    @override
    def nearest_sizes(self, widths: Widths, share: float, share_of: Callable[[Sizes], float], given: Sizes) -> Sizes:
        usual = min(divisors(widths.common_divisor), key=lambda number: abs(number - USUAL_BLOCKS))
        nblocks = given.get("nblocks") or usual
        rank = nearest_rank(widths, share, lambda rank: share_of({"nblocks": nblocks, "rank": rank}), nblocks)
        return {"rank": rank, "nblocks": nblocks}

    @override
    def tile_warnings(self, widths: Widths, given: Sizes) -> Iterator[str]:
        yield from rank_tile_warnings(widths, given)
        yield from block_tile_warnings(widths, given, given["rank"])
