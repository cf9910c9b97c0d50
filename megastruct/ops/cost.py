"""Cost of one linear map N -> M in each structure. Source: arXiv 2406.16450, table of section 2.

Every entry of a factor is used in exactly one multiply-add per token, so parameters and MACs per token are one number.
"""

from __future__ import annotations


def dense_weights(n: int, m: int) -> int:
    return n * m


def lowrank_weights(n: int, m: int, rank: int) -> int:
    return rank * (n + m)
