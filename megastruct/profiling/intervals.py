"""Arithmetic of sets of intervals, for what overlaps with what on a time line.

A set is a list of half-open intervals (start, end), sorted, disjoint and not empty, as `union` makes it. The unit is
that of the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The set of all points that some interval covers; the intervals may be in any order, overlap, or be empty."""
    merged: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def subtract(minuend: Sequence[Interval], subtrahend: Sequence[Interval]) -> list[Interval]:
    """The points of the first set that are not in the second."""
    left: list[Interval] = []
    first = 0  # intervals of the subtrahend before it end too early for all that follows
    for start, end in minuend:
        while first < len(subtrahend) and subtrahend[first][1] <= start:
            first += 1
        index = first
        while index < len(subtrahend) and subtrahend[index][0] < end:
            if start < subtrahend[index][0]:
                left.append((start, subtrahend[index][0]))
            start = max(start, subtrahend[index][1])
            index += 1
        if start < end:
            left.append((start, end))
    return left


def intersect(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """The points that are in both sets."""
    return subtract(first, subtract(first, second))


def length(intervals: Iterable[Interval]) -> float:
    """The summed length of the intervals of a set."""
    return sum(end - start for start, end in intervals)
