"""Which sizes divide over the ranks of a tensor-parallel group, and the nearest ones that do."""

from __future__ import annotations

from collections.abc import Iterator

from megastruct.errors import Problem


def shard_problems(
    tp_size: int,
    *,
    seq_length: int,
    vocab_size: int,
    num_attention_heads: int,
    hidden_size: int,
    ffn_hidden_size: int,
    structure: str = "dense",
    rank: int | None = None,
    nblocks: int | None = None,
) -> list[Problem]:
    """What does not divide over `tp_size` ranks, under the paths of config keys, each with the nearest that does.

    What the sizes must hold among themselves for every tp (blocks that divide the widths) is not looked at.
    """
    by_tp = f"parallel.tp = {tp_size}"
    problems = [
        *_no_multiple("training.seq_length", seq_length, tp_size, by_tp),
        *_no_multiple("model.num_attention_heads", num_attention_heads, tp_size, by_tp),
        *_vocabulary_problems(vocab_size, tp_size),
    ]
    if nblocks is None or tp_size == 1:
        return [*problems, *_no_multiple("model.ffn_hidden_size", ffn_hidden_size, tp_size, by_tp)]
    if not blocks_divide(nblocks, tp_size):
        widths = (hidden_size, ffn_hidden_size) if rank is None else (hidden_size, ffn_hidden_size, rank)
        found = f"{nblocks} blocks over parallel.tp = {tp_size} ranks: neither divides the other"
        problems.append(Problem("ffn.nblocks", found, f"ffn.nblocks={nearest_nblocks(nblocks, tp_size, widths)}"))
    elif structure == "blockshuffle":  # every rank has a share of the outputs of every block
        by_both = f"ffn.nblocks x parallel.tp = {nblocks} x {tp_size}"
        problems += _no_multiple("model.ffn_hidden_size", ffn_hidden_size, nblocks * tp_size, by_both)
    else:
        problems += _no_multiple("model.ffn_hidden_size", ffn_hidden_size, tp_size, by_tp)
    return problems


def blocks_divide(nblocks: int, tp_size: int) -> bool:
    """Whether a rank of an fc2 has whole blocks, or a block whole ranks."""
    return nblocks % tp_size == 0 or tp_size % nblocks == 0


def nearest_nblocks(nblocks: int, tp_size: int, widths: tuple[int, ...]) -> int:
    """The number of blocks nearest to `nblocks` that divides all widths and fits `tp_size`; 1 always does."""
    fitting = [
        blocks
        for blocks in range(1, min(widths) + 1)
        if blocks_divide(blocks, tp_size) and not any(width % blocks for width in widths)
    ]
    return min(fitting, key=lambda blocks: (abs(blocks - nblocks), blocks))


def nearest_multiple(value: int, divisor: int) -> int:
    """The positive multiple of `divisor` nearest to `value`, the smaller one of two."""
    below = value // divisor * divisor
    above = below + divisor
    return below if below and value - below <= above - value else above


def words_per_rank(vocab_size: int, tp_size: int) -> int:
    """The words of every rank but the last ones, which have what is left of the vocabulary."""
    return -(-vocab_size // tp_size)


def _no_multiple(where: str, value: int, divisor: int, divisor_name: str) -> Iterator[Problem]:
    if value % divisor:
        nearest = nearest_multiple(value, divisor)
        yield Problem(where, f"{value} is not divisible by {divisor_name}", f"{where}={nearest}")


def _vocabulary_problems(vocab_size: int, tp_size: int) -> Iterator[Problem]:
    """Any vocabulary will do of which no rank goes empty."""
    if words_per_rank(vocab_size, tp_size) * (tp_size - 1) >= vocab_size:
        nearest = nearest_multiple(vocab_size, tp_size)
        found = f"{vocab_size} words leave a rank of parallel.tp = {tp_size} without any"
        yield Problem("model.vocab_size", found, f"model.vocab_size={nearest}")
