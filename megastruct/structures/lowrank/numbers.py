"""LowRank(R): y = U (V x), V [R, N], U [M, R]; R values per token are communicated. Source: arXiv 2406.16450."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

from typing_extensions import override

from megastruct.errors import Problem
from megastruct.structures.numbers import Exchange, Form, Numbers, Sizes, Widths
from megastruct.structures.sizes import RANK, inner_width_problems, nearest_rank, rank_problems, rank_tile_warnings


class LowRankNumbers(Numbers):
    """The numbers of LowRank(R); the size is the rank R."""

    name = "lowrank"
    sizes: ClassVar = {"rank": RANK}
    formula = "`U (V x)`: V is R × N, U is M × R"
    weights_formula = "`R (N + M)`"

    @override
    def factor_shapes(self, n: int, m: int, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return {"v": (sizes["rank"], n), "u": (m, sizes["rank"])}

    @override
    def replicated_factors(self, form: Form) -> tuple[str, ...]:
        return ("v",) if form == "column" else ("u",)

    @override
    def inner_width(self, form: Form, n: int, m: int, sizes: Sizes) -> int:
        return sizes["rank"]

    @override
    def exchange(self, form: Form, n: int, m: int, tp_size: int, sizes: Sizes) -> Exchange:
        return Exchange("all_gather" if form == "column" else "reduce_scatter", sizes["rank"])

    @override
    def size_problems(self, widths: Widths, given: Sizes) -> Iterator[Problem]:
        yield from rank_problems(widths, self.name, given)

    @override
    def shard_problems(self, widths: Widths, given: Sizes) -> Iterator[Problem]:
        yield from inner_width_problems(widths, widths.tp, f"{widths.tp_name} = {widths.tp}")

    @override
    def nearest_sizes(self, widths: Widths, share: float, share_of: Callable[[Sizes], float], given: Sizes) -> Sizes:
        return {"rank": nearest_rank(widths, share, lambda rank: share_of({"rank": rank}))}

    @override
    def tile_warnings(self, widths: Widths, given: Sizes) -> Iterator[str]:
        yield from rank_tile_warnings(widths, given)
