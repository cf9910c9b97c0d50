"""Linear layers of one process. Dense and structured ones have the same interface."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from megastruct.errors import SizeError
from megastruct.parallel.seeds import Names, draw_normal
from megastruct.structures.numbers import Numbers, Widths
from megastruct.structures.orthonormal import orthonormalized
from megastruct.structures.spectral import spectral_scale

_left_empty: ContextVar[bool] = ContextVar("left_empty", default=False)


@contextmanager
def empty_weights() -> Iterator[None]:
    """Linear layers that are made inside hold uninitialised memory: their weights come from elsewhere."""
    token = _left_empty.set(True)
    try:
        yield
    finally:
        _left_empty.reset(token)


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
        """Make the layer with its first weights, as `reset_parameters` draws them.

        `in_features` N, `out_features` M; `sizes`: those of the structure, such as `rank`.
        `init_std`: standard deviation of the draws that the factors start from. None: each factor, and each of its
        blocks, starts as an orthonormal matrix times `spectral_scale` of its shape.

        Raises SizeError for sizes that do not fit the widths, with the nearest that do.
        """
        super().__init__()
        check_sizes(self.numbers, Widths(in_features, out_features), sizes)
        self.in_features, self.out_features, self.sizes, self.init_std = in_features, out_features, sizes, init_std
        shapes = self.numbers.factor_shapes(in_features, out_features, sizes)
        self.factor_names = tuple(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        if not _left_empty.get():
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as for training, with a seed from PyTorch's global generator; the bias becomes zero."""
        self.init_weights((int(torch.randint(2**62, (), device="cpu")), "weights"))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def factors(self) -> list[Tensor]:
        """The factors, in the order of `Numbers.factor_shapes`."""
        return [getattr(self, name) for name in self.factor_names]

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., N] to [..., M]."""
        return self.maths.apply(x, *self.factors(), bias=self.bias)

    def to_dense(self) -> Tensor:
        """The equal dense weight [M, N]."""
        return self.maths.to_dense(*self.factors())

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """The equal `torch.nn.Linear`, with a copy of the merged weight and of the bias."""
        weight = self.to_dense()
        options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        merged = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, self.bias is not None, **options)
        merged.weight.copy_(weight)
        if self.bias is not None:
            merged.bias.copy_(self.bias)
        return merged

    @override
    @torch.no_grad()
    def init_weights(self, names: Names) -> None:
        drawn = self.draw_factors(1.0 if self.init_std is None else self.init_std, names)
        for name, factor in drawn.items():
            if self.init_std is None:
                factor = orthonormalized(factor) * spectral_scale(factor)
            getattr(self, name).copy_(factor)

    def draw_factors(self, std: float, names: Names) -> Mapping[str, Tensor]:
        """The initial factors by name: `init_factors` of the structure's `maths`, of draws from N(0, std^2)."""
        draws = (draw_normal(tuple(getattr(self, name).shape), std, (*names, name)) for name in self.factor_names)
        return dict(zip(self.factor_names, self.maths.init_factors(*draws, std=std), strict=True))

    @override
    def extra_repr(self) -> str:
        sizes = "".join(f", {key}={value}" for key, value in self.sizes.items())
        return f"{self.in_features}, {self.out_features}{sizes}, bias={self.bias is not None}"


def check_sizes(numbers: Numbers, widths: Widths, sizes: Mapping[str, int]) -> None:
    """Raise SizeError with everything that does not fit, and the nearest sizes that do."""
    if foreign := [name for name in sizes if name not in numbers.sizes]:
        raise SizeError(f"{numbers.name} has no {', '.join(foreign)}; its sizes: {', '.join(numbers.sizes) or 'none'}")
    outer_and_inner = {widths.outer_name: widths.outer, widths.inner_name: widths.inner}
    wrong = {name: value for name, value in outer_and_inner.items() if not _is_whole(value) or value < 1}
    wrong |= {name: value for name, value in sizes.items() if value is not None and not _is_whole(value)}
    if wrong:
        found = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise SizeError(f"{numbers.name}: {found}: widths and sizes are whole numbers of at least 1")
    problems = list(numbers.size_problems(widths, sizes)) or list(numbers.shard_problems(widths, sizes))
    if problems:
        raise SizeError("; ".join(f"{numbers.name}: {problem!s}" for problem in problems))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
