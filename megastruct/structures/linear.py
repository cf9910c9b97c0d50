"""Linear layers of one process. Dense and structured ones have the same interface."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from megastruct.parallel.seeds import Names
from megastruct.structures.numbers import Numbers, Widths
from megastruct.structures.orthonormal import nearest_orthonormal
from megastruct.structures.spectral import spectral_scale


class SeededLayer(nn.Module):
    """A layer of one process whose first weights depend on names alone."""

    def init_weights(self, names: Names) -> None:
        """Fill the parameters from the random streams named by `names` (the seed and the layer's full name).

        So the weights do not depend on what else is built, in which order or where.
        """
        raise NotImplementedError


class StructuredLinear(SeededLayer):
    """y = structured(factors) x + b: factors [..., d_out, d_in], bias [M].

    The shapes of the factors come from the structure's numbers. The class of a structure sets `numbers` and `maths`,
    and draws its factors in `draw_factors`.
    """

    numbers: ClassVar[Numbers]
    maths: ClassVar[ModuleType]
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, init_std: float | None = 0.02, **sizes: int
    ) -> None:
        """Register the factors and the bias; the factors stay empty until `init_weights`.

        `init_std`: standard deviation of the draws that the factors start from. None: each factor, and each of its
        blocks, starts as an orthonormal matrix times `spectral_scale` of its shape.

        Raises ValueError for sizes that do not fit the widths, with the nearest that do.
        """
        super().__init__()
        check_sizes(self.numbers, Widths(in_features, out_features), sizes)
        self.in_features, self.out_features, self.sizes, self.init_std = in_features, out_features, sizes, init_std
        shapes = self.numbers.factor_shapes(in_features, out_features, sizes)
        self.factor_names = tuple(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def factors(self) -> list[Tensor]:
        """The factors, in the order of `Numbers.factor_shapes`."""
        return [getattr(self, name) for name in self.factor_names]

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., N] to [..., M]."""
        return self.maths.apply(x, *self.factors(), bias=self.bias)

    def to_dense(self) -> Tensor:
        """The equal dense weight [M, N]."""
        return self.maths.to_dense(*self.factors())

    @override
    @torch.no_grad()
    def init_weights(self, names: Names) -> None:
        drawn = self.draw_factors(1.0 if self.init_std is None else self.init_std, names)
        for name, factor in drawn.items():
            if self.init_std is None:
                factor = nearest_orthonormal(factor) * spectral_scale(factor)
            getattr(self, name).copy_(factor)

    def draw_factors(self, std: float, names: Names) -> Mapping[str, Tensor]:
        """The initial factors by name, made from draws of N(0, std^2)."""
        raise NotImplementedError

    @override
    def extra_repr(self) -> str:
        sizes = "".join(f", {key}={value}" for key, value in self.sizes.items())
        return f"{self.in_features}, {self.out_features}{sizes}, bias={self.bias is not None}"


def check_sizes(numbers: Numbers, widths: Widths, sizes: Mapping[str, int]) -> None:
    """Raise ValueError with everything that does not fit, and the nearest sizes that do."""
    problems = list(numbers.size_problems(widths, sizes)) or list(numbers.shard_problems(widths, sizes))
    if problems:
        raise ValueError("; ".join(f"{numbers.name}: {problem!s}" for problem in problems))
