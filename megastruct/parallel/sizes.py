"""Sizes that must divide each other, and the nearest sizes that do."""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

from megastruct.errors import Problem


def nearest_multiple(value: int, divisor: int) -> int:
    """The positive multiple of `divisor` nearest to `value`; of two equally near, the smaller."""
    below = value // divisor * divisor
    above = below + divisor
    return below if below and value - below <= above - value else above


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`; of two equally near, the smaller."""
    return min(divisors(number), key=lambda k: (abs(k - wanted), k))


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, in ascending order."""
    small = [divisor for divisor in range(1, isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def words_per_rank(vocab_size: int, tp_size: int) -> int:
    """Words of the vocabulary per rank, rounded up; the last ranks have fewer where `tp_size` does not divide it."""
    return -(-vocab_size // tp_size)


def multiple_problems(where: str, value: int, divisor: int, divisor_name: str) -> Iterator[Problem]:
    """A problem if `value`, the value of the config key `where`, is not a multiple of `divisor`."""
    if value % divisor:
        nearest = nearest_multiple(value, divisor)
        yield Problem(where, f"{value} is not divisible by {divisor_name}", f"{where}={nearest}")


def vocabulary_problems(where: str, vocab_size: int, tp_size: int) -> Iterator[Problem]:
    """A problem if the vocabulary is too small to give every rank at least one word."""
    if words_per_rank(vocab_size, tp_size) * (tp_size - 1) >= vocab_size:
        nearest = nearest_multiple(vocab_size, tp_size)
        found = f"{vocab_size} words leave a rank of parallel.tp = {tp_size} without any"
        yield Problem(where, found, f"{where}={nearest}")
