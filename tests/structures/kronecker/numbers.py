"""Kronecker(k): W = A ⊗ B with A [M/k, N/k] and B [k, k]; input feature i k + j is row i, column j of a matrix X, and
y = A X B^T. The column form applies B before the gather, the row form after the reduce-scatter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

from megastruct.errors import Problem
from megastruct.parallel.sizes import multiple_problems, nearest_divisor
from megastruct.structures.numbers import Exchange, Form, Numbers, Sizes, Widths
from megastruct.structures.sizes import divisors


class KroneckerNumbers(Numbers):
    name = "kronecker"
    sizes: ClassVar = {"order": "order k of the small factor"}
    formula = "`(A ⊗ B) x`: A is M/k × N/k, B is k × k"
    weights_formula = "`N M / k² + k²`"

    def factor_shapes(self, n: int, m: int, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        order = sizes["order"]
        return {"a": (m // order, n // order), "b": (order, order)}

    def replicated_factors(self, form: Form) -> tuple[str, ...]:
        return ("b",)

    def inner_width(self, form: Form, n: int, m: int, sizes: Sizes) -> int:
        return n if form == "column" else m

    def exchange(self, form: Form, n: int, m: int, tp_size: int, sizes: Sizes) -> Exchange:
        return Exchange("all_gather", n) if form == "column" else Exchange("reduce_scatter", m)

    def multiply_adds(self, form: Form, n: int, m: int, sizes: Sizes) -> int:
        """B acts on every row of X or of A X, whichever are fewer, and A on every column."""
        return min(n, m) * sizes["order"] + n * m // sizes["order"]

    def size_problems(self, widths: Widths, given: Sizes) -> Iterator[Problem]:
        order, common = given.get("order"), widths.common_divisor
        if order is None:
            found = f"missing, but {widths.prefix}structure is {self.name}"
            yield widths.problem("order", found, nearest_divisor(common, 4))
        elif order < 1 or common % order:
            found = f"{order} does not divide {widths.outer_name} = {widths.outer} and {widths.inner_name}"
            yield widths.problem("order", f"{found} = {widths.inner}", nearest_divisor(common, order))

    def shard_problems(self, widths: Widths, given: Sizes) -> Iterator[Problem]:
        divisor, name = given["order"] * widths.tp, f"{widths.prefix}order x {widths.tp_name}"
        yield from multiple_problems(widths.inner_name, widths.inner, divisor, name)

    def nearest_sizes(self, widths: Widths, share: float, share_of: Callable[[Sizes], float], given: Sizes) -> Sizes:
        fitting = [{"order": order} for order in divisors(widths.common_divisor)]
        return min(fitting, key=lambda sizes: abs(share_of(sizes) - share))
