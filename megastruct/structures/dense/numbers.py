"""Dense: y = W x, one matrix. Megatron's pair communicates the outer width d, before fc1 and after fc2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

from typing_extensions import override

from megastruct.errors import Problem
from megastruct.structures.numbers import Exchange, Form, Numbers, Sizes, Widths
from megastruct.structures.sizes import inner_width_problems


class DenseNumbers(Numbers):
    """The numbers of a dense matrix, which has no sizes of its own."""

    name = "dense"
    sizes: ClassVar[Mapping[str, str]] = {}
    formula = "`W x`"
    weights_formula = "`N M`"

    @override
    def factor_shapes(self, n: int, m: int, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return {"weight": (m, n)}

    @override
    def replicated_factors(self, form: Form) -> tuple[str, ...]:
        return ()

    @override
    def inner_width(self, form: Form, n: int, m: int, sizes: Sizes) -> int:
        return 0

    @override
    def exchange(self, form: Form, n: int, m: int, tp_size: int, sizes: Sizes) -> Exchange:
        return Exchange("all_gather", n) if form == "column" else Exchange("reduce_scatter", m, ends_the_map=True)

    @override
    def size_problems(self, widths: Widths, given: Sizes) -> Iterator[Problem]:
        yield from ()

    @override
    def shard_problems(self, widths: Widths, given: Sizes) -> Iterator[Problem]:
        yield from inner_width_problems(widths, widths.tp, f"{widths.tp_name} = {widths.tp}")

    @override
    def nearest_sizes(self, widths: Widths, share: float, share_of: Callable[[Sizes], float], given: Sizes) -> Sizes:
        return {}
