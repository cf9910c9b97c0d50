"""Dense: y = W x, one matrix. Megatron's pair communicates the outer width d, before fc1 and after fc2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

from megastruct.errors import Problem
from megastruct.structures.numbers import Exchange, Form, Numbers, Sizes, Widths
from megastruct.structures.sizes import inner_width_problems


class DenseNumbers(Numbers):
    name = "dense"
    sizes: ClassVar[Mapping[str, str]] = {}
    formula = "`W x`"
    weights_formula = "`N M`"

    def factor_shapes(self, n: int, m: int, **sizes: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (m, n)}

    def replicated_factors(self, form: Form) -> tuple[str, ...]:
        return ()

    def inner_width(self, form: Form, n: int, m: int, **sizes: int) -> int:
        return 0

    def exchange(self, form: Form, n: int, m: int, tp_size: int, **sizes: int) -> Exchange:
        return Exchange("all_gather", n) if form == "column" else Exchange("reduce_scatter", m, ends_the_map=True)

    def size_problems(self, widths: Widths, given: Sizes) -> Iterator[Problem]:
        yield from ()

    def shard_problems(self, widths: Widths, given: Sizes) -> Iterator[Problem]:
        yield from inner_width_problems(widths, widths.tp, f"{widths.tp_name} = {widths.tp}")

    def nearest_sizes(self, widths: Widths, share: float, share_of: Callable[[Sizes], float], given: Sizes) -> Sizes:
        return {}
