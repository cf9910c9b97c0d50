"""The two sizes that several structures have, a rank and a number of blocks, and the rules for them.

The functions yield a `Problem` for each size that does not fit, with the nearest value that does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import gcd, lcm

from megastruct.errors import Problem
from megastruct.parallel.sizes import divisors, multiple_problems, nearest_multiple
from megastruct.structures.numbers import Sizes, Widths

TILE = 128  # features; the width of a tile of a GPU's matrix product
GRANULES = (TILE, 64, 32, 16, 8, 4, 2, 1)
USUAL_BLOCKS = 4

RANK = "inner width R"
NBLOCKS = "number of blocks B"


def rank_problems(widths: Widths, structure: str, given: Sizes, nblocks: int = 1) -> Iterator[Problem]:
    """Problems with a rank, which must be at most the full rank and a multiple of the number of blocks."""
    rank, full_rank = given.get("rank"), widths.full_rank
    if rank is None:
        nearest = nearest_multiple(min(widths.outer // 4, full_rank), nblocks)
        yield widths.problem("rank", f"missing, but {widths.prefix}structure is {structure}", nearest)
    elif rank < 1:
        yield widths.problem("rank", f"{rank} is less than 1", nearest_multiple(max(1, full_rank // 2), nblocks))
    elif rank > full_rank:
        nearest = nearest_multiple(max(1, full_rank // 2), nblocks)
        yield widths.problem("rank", f"{rank} is above the full rank {full_rank}", nearest)
    elif rank % nblocks:
        nearest = min(nearest_multiple(rank, nblocks), full_rank)
        yield widths.problem("rank", f"{rank} is not a multiple of {widths.prefix}nblocks = {nblocks}", nearest)


def block_problems(widths: Widths, structure: str, given: Sizes) -> Iterator[Problem]:
    """Problems with a number of blocks, which must divide both widths."""
    nblocks, nearest = given.get("nblocks"), fitting_blocks(widths, given)
    if nblocks is None:
        yield widths.problem("nblocks", f"missing, but {widths.prefix}structure is {structure}", nearest)
    elif nblocks < 1 or widths.common_divisor % nblocks:
        sizes = f"{widths.outer_name} = {widths.outer} and {widths.inner_name} = {widths.inner}"
        yield widths.problem("nblocks", f"{nblocks} does not divide {sizes}", nearest)


def fitting_blocks(widths: Widths, given: Sizes) -> int:
    """The given number of blocks if it divides the widths, else the nearest number that does, also over the ranks.

    That number divides the given rank too, if the rank is a valid one.
    """
    nblocks, rank, common = given.get("nblocks"), given.get("rank"), widths.common_divisor
    if nblocks and nblocks > 0 and common % nblocks == 0:
        return nblocks
    divided = gcd(common, rank) if rank and 0 < rank <= widths.full_rank else common
    return nearest_nblocks(nblocks or USUAL_BLOCKS, widths.tp, [divided])


def inner_width_problems(widths: Widths, divisor: int, divisor_name: str) -> Iterator[Problem]:
    """A problem if the inner width is not a multiple of `divisor`."""
    yield from multiple_problems(widths.inner_name, widths.inner, divisor, divisor_name)


def block_shard_problems(widths: Widths, given: Sizes) -> Iterator[Problem]:
    """A problem if neither the number of blocks nor the number of ranks divides the other."""
    nblocks = given["nblocks"]
    if blocks_divide(nblocks, widths.tp):
        return
    divided = [widths.outer, widths.inner, *([given["rank"]] if "rank" in given else [])]
    found = f"{nblocks} blocks over {widths.tp_name} = {widths.tp} ranks: neither divides the other"
    yield widths.problem("nblocks", found, nearest_nblocks(nblocks, widths.tp, divided))


def blocks_divide(nblocks: int, tp_size: int) -> bool:
    """Whether each rank of a row map holds whole blocks, or each block is shared by whole ranks."""
    return nblocks % tp_size == 0 or tp_size % nblocks == 0


def nearest_nblocks(nblocks: int, tp_size: int, divided: list[int]) -> int:
    """The number of blocks nearest to `nblocks` that divides all of `divided` and fits `tp_size`; 1 always does."""
    fitting = [blocks for blocks in divisors(gcd(*divided)) if blocks_divide(blocks, tp_size)]
    return min(fitting, key=lambda blocks: (abs(blocks - nblocks), blocks))


def nearest_rank(widths: Widths, share: float, share_of: Callable[[int], float], nblocks: int = 1) -> int:
    """The rank whose weights come nearest to `share` of the dense weights; the share is proportional to the rank.

    The rank is a multiple of 128 if one comes within 5 % of the share, else a multiple of 64, of 32 and so on.
    """
    exact = share / share_of(nblocks) * nblocks
    rank = nblocks
    for granule in GRANULES:
        rank = nearest_multiple(round(exact), lcm(granule, nblocks))
        if rank <= widths.full_rank and abs(rank / exact - 1) <= 0.05:
            break
    return min(rank, widths.full_rank)


def rank_tile_warnings(widths: Widths, given: Sizes) -> Iterator[str]:
    """A warning if the rank is not a multiple of a tile's width."""
    rank, where = given["rank"], f"{widths.prefix}rank"
    if rank % TILE:
        nearest = nearest_multiple(rank, TILE)
        yield f"{where} = {rank} is not a multiple of {TILE}, so tiles stay half empty; try {where}={nearest}"


def block_tile_warnings(widths: Widths, given: Sizes, blocked_width: int) -> Iterator[str]:
    """A warning if the blocks of `blocked_width` features are not multiples of half a tile's width."""
    nblocks, where = given["nblocks"], f"{widths.prefix}nblocks"
    width = blocked_width // nblocks
    if width % (TILE // 2):
        yield f"{where} = {nblocks} gives blocks of width {width}, not a multiple of {TILE // 2}; try fewer blocks"
