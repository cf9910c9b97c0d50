"""Arithmetic of sizes that must divide, and the nearest that do."""

from __future__ import annotations

from collections.abc import Iterator

from megastruct.errors import Problem


def nearest_multiple(value: int, divisor: int) -> int:
    """The positive multiple of `divisor` nearest to `value`, the smaller one of two."""
    below = value // divisor * divisor
    above = below + divisor
    return below if below and value - below <= above - value else above


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`, the smaller one of two."""
    divisors = [k for k in range(1, number + 1) if number % k == 0]
    return min(divisors, key=lambda k: (abs(k - wanted), k))


def words_per_rank(vocab_size: int, tp_size: int) -> int:
    """The words of every rank but the last ones, which have what is left of the vocabulary."""
    return -(-vocab_size // tp_size)


def multiple_problems(where: str, value: int, divisor: int, divisor_name: str) -> Iterator[Problem]:
    """A problem if `value`, the key `where` of a config, does not divide by `divisor`."""
    if value % divisor:
        nearest = nearest_multiple(value, divisor)
        yield Problem(where, f"{value} is not divisible by {divisor_name}", f"{where}={nearest}")


def vocabulary_problems(where: str, vocab_size: int, tp_size: int) -> Iterator[Problem]:
    """Any vocabulary fits that leaves no rank without words."""
    if words_per_rank(vocab_size, tp_size) * (tp_size - 1) >= vocab_size:
        nearest = nearest_multiple(vocab_size, tp_size)
        found = f"{vocab_size} words leave a rank of parallel.tp = {tp_size} without any"
        yield Problem(where, found, f"{where}={nearest}")
