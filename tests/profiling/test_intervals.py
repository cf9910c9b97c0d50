"""Sets of intervals, in numbers."""

from __future__ import annotations

import random

from megastruct.profiling.intervals import intersect, length, subtract, union


def test_union_joins_what_overlaps_or_touches() -> None:
    assert union([(5, 7), (0, 2), (1, 3), (3, 4), (9, 9), (6, 6.5)]) == [(0, 4), (5, 7)]
    assert union([]) == []


def test_a_collective_beside_and_after_compute() -> None:
    """Compute 0-10 and 14-20; a collective 8-16: 4 of its 8 are exposed; the last 2 of 22 are idle."""
    compute, collective = union([(0, 6), (6, 10), (14, 20)]), union([(8, 16)])
    assert subtract(collective, compute) == [(10, 14)]
    assert length(collective) == 8 and length(subtract(collective, compute)) == 4
    assert intersect(collective, compute) == [(8, 10), (14, 16)]
    assert subtract([(0, 22)], union([*compute, *collective])) == [(20, 22)]


def test_subtract_cuts_holes_and_ends() -> None:
    assert subtract([(0, 10), (12, 20)], [(-1, 1), (3, 4), (9, 13), (19, 30)]) == [(1, 3), (4, 9), (13, 19)]
    assert subtract([(0, 1)], [(0, 1)]) == [] and subtract([(0, 1)], []) == [(0, 1)]
    assert subtract([(0, 2), (4, 6)], [(1, 5)]) == [(0, 1), (5, 6)]


def test_against_counted_points() -> None:
    draw = random.Random(0)
    for _ in range(200):
        first, second = (
            [(start := draw.randrange(30), start + draw.randrange(6)) for _ in range(draw.randrange(8))]
            for _ in range(2)
        )
        points = [{x for start, end in some for x in range(start, end)} for some in (first, second)]
        sets = union(first), union(second)
        assert length(sets[0]) == len(points[0])
        assert length(subtract(*sets)) == len(points[0] - points[1])
        assert length(intersect(*sets)) == len(points[0] & points[1])
