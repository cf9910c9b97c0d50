"""BlockDense(B, R): y = U (V_b x), V_b block-diagonal. fc1 gathers R values per token, fc2 exchanges R / min(tp, B).

Source: arXiv 2406.16450.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

from megastruct.errors import Problem
from megastruct.structures.numbers import Exchange, Form, Numbers, Sizes, Widths
from megastruct.structures.sizes import (
    NBLOCKS,
    RANK,
    USUAL_BLOCKS,
    block_problems,
    block_shard_problems,
    block_tile_warnings,
    divisors,
    fitting_blocks,
    inner_width_problems,
    nearest_rank,
    rank_problems,
    rank_tile_warnings,
)


class BlockDenseNumbers(Numbers):
    name = "blockdense"
    sizes: ClassVar = {"rank": RANK, "nblocks": NBLOCKS}
    formula = "`U (V_b x)`: V_b is block-diagonal with B blocks of R/B × N/B, U is M × R"
    weights_formula = "`R (N/B + M)`"

    def factor_shapes(  # type: ignore[override]
        self, n: int, m: int, *, nblocks: int, rank: int
    ) -> dict[str, tuple[int, ...]]:
        return {"v": (nblocks, rank // nblocks, n // nblocks), "u": (m, rank)}

    def replicated_factors(self, form: Form) -> tuple[str, ...]:
        return ("v",) if form == "column" else ("u",)

    def inner_width(self, form: Form, n: int, m: int, *, nblocks: int, rank: int) -> int:  # type: ignore[override]
        return rank

    def exchange(  # type: ignore[override]
        self, form: Form, n: int, m: int, tp_size: int, *, nblocks: int, rank: int
    ) -> Exchange:
        """A rank of the row form has whole blocks, or shares one block with others: nothing larger is partial."""
        return (
            Exchange("all_gather", rank) if form == "column" else Exchange("all_to_all", rank // min(tp_size, nblocks))
        )

    def size_problems(self, widths: Widths, given: Sizes) -> Iterator[Problem]:
        yield from block_problems(widths, self.name, given)
        yield from rank_problems(widths, self.name, given, fitting_blocks(widths, given))

    def shard_problems(self, widths: Widths, given: Sizes) -> Iterator[Problem]:
        blocks = list(block_shard_problems(widths, given))
        yield from blocks or inner_width_problems(widths, widths.tp, f"{widths.tp_name} = {widths.tp}")

    def nearest_sizes(self, widths: Widths, share: float, share_of: Callable[[Sizes], float], given: Sizes) -> Sizes:
        usual = min(divisors(widths.common_divisor), key=lambda number: abs(number - USUAL_BLOCKS))
        nblocks = given.get("nblocks") or usual
        rank = nearest_rank(widths, share, lambda rank: share_of({"nblocks": nblocks, "rank": rank}), nblocks)
        return {"rank": rank, "nblocks": nblocks}

    def tile_warnings(self, widths: Widths, given: Sizes) -> Iterator[str]:
        yield from rank_tile_warnings(widths, given)
        yield from block_tile_warnings(widths, given, given["rank"])
