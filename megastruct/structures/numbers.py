"""What is known about a structure without its mathematics: sizes, weights, communication, and which sizes fit.

Everything here is integer arithmetic and loads no torch, so that configs are checked and runs planned in an instant.

Letters: N inputs and M outputs of a linear map; d and f the outer and the inner width of a feed-forward network; tp the
ranks of a tensor-parallel group. A map has one of two forms. "column": from the outer width into the inner one, whose
features are shared out over the ranks (fc1). "row": from the inner width back to the outer one (fc2).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from megastruct.errors import Problem

Form = Literal["column", "row"]
Collective = Literal["all_gather", "reduce_scatter", "all_to_all"]
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Exchange:
    """The collective of a map's forward. Each rank sends (tp-1)/tp x `width` values per token of the sequence.

    The backward sends as many, with the adjoint collective. `ends_the_map`: no product follows the collective, so the
    second forward of activation checkpointing skips it.
    """

    collective: Collective
    width: int
    ends_the_map: bool = False


@dataclass(frozen=True)
class Widths:
    """The widths that sizes must fit, and the names that messages give them.

    `prefix` is put before the name of a size, as in `ffn.rank`.
    """

    outer: int
    inner: int
    tp: int = 1
    outer_name: str = "in_features"
    inner_name: str = "out_features"
    tp_name: str = "tp"
    prefix: str = ""

    @property
    def full_rank(self) -> int:
        """The rank of a dense matrix between the two widths."""
        return min(self.outer, self.inner)

    @property
    def common_divisor(self) -> int:
        """The greatest common divisor of the two widths."""
        return math.gcd(self.outer, self.inner)

    def problem(self, size: str, found: str, nearest: int | None) -> Problem:
        """A problem with one size. `nearest` is the value that fits, None if there is none to suggest."""
        where = f"{self.prefix}{size}"
        return Problem(where, found, "" if nearest is None else f"{where}={nearest}")


class Numbers(ABC):
    """The numbers of one structure. Subclasses are registered in `registry.py`.

    Attributes:
        name: as in the config's `ffn.structure`.
        sizes: the keys of the config's `ffn` section that it needs, each with a description. Methods take their values
            as one mapping `sizes`, layers as keyword arguments.
        formula: the map, for the documentation.
        weights_formula: the number of weights, for the documentation.
    """

    name: ClassVar[str]
    sizes: ClassVar[Mapping[str, str]]
    formula: ClassVar[str]
    weights_formula: ClassVar[str]

    @abstractmethod
    def factor_shapes(self, n: int, m: int, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """The global shape [..., d_out, d_in] of every factor of a map N -> M, by parameter name."""

    @abstractmethod
    def replicated_factors(self, form: Form) -> tuple[str, ...]:
        """The factors that every tensor-parallel rank holds as a whole. The others are sharded."""

    @abstractmethod
    def inner_width(self, form: Form, n: int, m: int, sizes: Sizes) -> int:
        """Values per token between the factors, which are kept for the backward; 0 if there is only one factor."""

    @abstractmethod
    def exchange(self, form: Form, n: int, m: int, tp_size: int, sizes: Sizes) -> Exchange:
        """What a sharded map of this form communicates in its forward."""

    @abstractmethod
    def size_problems(self, widths: Widths, given: Sizes) -> Iterator[Problem]:
        """Sizes that are missing or do not fit these widths, without tensor parallelism.

        The suggestions of all problems are consistent with each other.
        """

    @abstractmethod
    def shard_problems(self, widths: Widths, given: Sizes) -> Iterator[Problem]:
        """Sizes and widths that do not divide over the `tp` ranks, each with the nearest value that does."""

    @abstractmethod
    def nearest_sizes(self, widths: Widths, share: float, share_of: Callable[[Sizes], float], given: Sizes) -> Sizes:
        """The sizes whose weights come nearest to `share` of the dense weights. `share_of` gives the share of sizes.

        `given` are the sizes of the config; whatever `share` does not decide is taken from them.
        """

    def tile_warnings(self, widths: Widths, given: Sizes) -> Iterator[str]:
        """Sizes that work but leave the tiles of a GPU's matrix products half empty."""
        yield from ()

    def weights(self, n: int, m: int, sizes: Sizes) -> int:
        """Number of entries of all factors."""
        return sum(math.prod(shape) for shape in self.factor_shapes(n, m, sizes).values())

    def replicated_weights(self, form: Form, n: int, m: int, sizes: Sizes) -> int:
        """Number of entries of the factors that every rank holds as a whole."""
        shapes = self.factor_shapes(n, m, sizes)
        return sum(math.prod(shapes[name]) for name in self.replicated_factors(form))

    def multiply_adds(self, form: Form, n: int, m: int, sizes: Sizes) -> int:
        """Multiply-adds per token. Unless a structure says otherwise, every weight is used once."""
        return self.weights(n, m, sizes)


@dataclass(frozen=True)
class LinearMap:
    """One linear map N -> M of a structure, in one form, with its sizes."""

    numbers: Numbers
    form: Form
    n: int
    m: int
    sizes: Sizes = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Number of entries of all factors."""
        return self.numbers.weights(self.n, self.m, self.sizes)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds per token, over all ranks."""
        return self.numbers.multiply_adds(self.form, self.n, self.m, self.sizes)

    @property
    def inner_width(self) -> int:
        """Values per token between the factors; 0 if there is only one factor."""
        return self.numbers.inner_width(self.form, self.n, self.m, self.sizes)

    @property
    def replicated_weights(self) -> int:
        """Number of entries of the factors that every tensor-parallel rank holds as a whole."""
        return self.numbers.replicated_weights(self.form, self.n, self.m, self.sizes)

    def exchange(self, tp_size: int) -> Exchange:
        """The collective of the forward over `tp_size` ranks."""
        return self.numbers.exchange(self.form, self.n, self.m, tp_size, self.sizes)


def share_of_dense(linears: Sequence[LinearMap]) -> float:
    """The weights of the maps together, as a share of the weights of dense maps of the same widths."""
    return sum(linear.weights for linear in linears) / sum(linear.n * linear.m for linear in linears)
