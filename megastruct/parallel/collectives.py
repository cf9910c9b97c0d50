"""The collectives of tensor parallelism, each with its adjoint.

Letters: s sequence, b micro-batch, T = s*b tokens, c features, tp ranks of the group. Rank t owns the positions
[t * s/tp, (t+1) * s/tp) of the sequence, which are the tokens [t * T/tp, (t+1) * T/tp).

    name                       forward                                   backward
    gather_sequence            all-gather      [s/tp,b,c] -> [s,b,c]     reduce-scatter  [s,b,c] -> [s/tp,b,c]
    reduce_scatter_sequence    reduce-scatter  [s,b,c] -> [s/tp,b,c]     all-gather      [s/tp,b,c] -> [s,b,c]
    gather_tokens              all-gather      [c,T/tp] -> [c,T]         reduce-scatter  [c,T] -> [c,T/tp]
    features_to_tokens         all-to-all      [c/tp,T] -> [c,T/tp]      all-to-all      [c,T/tp] -> [c/tp,T]
    sum_gradient               nothing                                   all-reduce      of the gradient, or nothing

gather_tokens and features_to_tokens are feature-major, like the operands of the block-diagonal products, so the order
of the exchange is the order of the product: one copy is made where a sequence-first tensor would need two or three. A
group of size 1 communicates nothing and needs no process group. Dtypes are kept: a bf16 tensor is summed in bf16. To
torch.compile the transport is an opaque operator: there is no graph break, and nothing is reordered across ranks as
long as all ranks compile the same program. Source of the pairs: Korthikanti et al. 2022 (arXiv 2205.05198).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from megastruct.parallel.groups import StageGroup, TensorGroup

_BUCKET_VALUES = 1 << 24  # of one all-reduce of several gradients, which are copied into the bucket
_records: list[tuple[str, int]] | None = None


@contextmanager
def count_bytes() -> Iterator[list[tuple[str, int]]]:
    """Inside, every collective of this process appends (operation, bytes that this rank sends); for tests.

    The bytes are those of the ring or pairwise algorithm, which sends least: (tp-1) x its shard for an all-gather,
    (tp-1)/tp x its input for a reduce-scatter and an all-to-all, twice that for an all-reduce.
    """
    global _records
    outer, _records = _records, []
    try:
        yield _records
    finally:
        _records = outer


def gather_sequence(x: Tensor, tp: TensorGroup) -> Tensor:
    """Gather x [s/tp, b, c] to [s, b, c], all ranks' tokens; the backward sums the gradients of the own tokens."""
    return x if tp.size == 1 else _GatherSequence.apply(x, _name(tp), tp.size)


def reduce_scatter_sequence(x: Tensor, tp: TensorGroup) -> Tensor:
    """Sum x [s, b, c] over the ranks and return the part [s/tp, b, c] of the own tokens; the backward gathers."""
    return x if tp.size == 1 else _ReduceScatterSequence.apply(x, _name(tp), tp.size)


def gather_tokens(x: Tensor, tp: TensorGroup) -> Tensor:
    """Gather x [c, T/tp] to [c, T], feature-major; the backward sums the ranks' gradients of the own tokens."""
    if tp.size == 1:
        return x
    return gather_sequence(x, tp).unflatten(0, (tp.size, -1)).transpose(0, 1).flatten(1)  # [tp * c, T/tp] -> [c, T]


def features_to_tokens(x: Tensor, tp: TensorGroup) -> Tensor:
    """Exchange x [c/tp, T], a slice of the features of all tokens, for [c, T/tp], all features of the own tokens.

    The features are ordered by rank of origin. The backward is the reverse exchange.
    """
    if tp.size == 1:
        return x
    by_destination = x.unflatten(1, (tp.size, -1)).transpose(0, 1).flatten(0, 1)  # [tp * c/tp, T/tp]
    return _AllToAll.apply(by_destination, _name(tp), tp.size)


def sum_gradient(w: Tensor, tp: TensorGroup) -> Tensor:
    """Return w itself, of any shape; its gradient is summed over the group, to the same bits on all ranks.

    This is for a replicated parameter that each rank applies to its own tokens, so that each knows only a part of the
    gradient. The all-reduce runs in every backward and sends 2 (tp-1)/tp values per entry of w. If the group
    `sums_once`, the sum is left to `sum_gradients`.
    """
    return w if tp.size == 1 or tp.sums_once else _SumGradient.apply(w, _name(tp), tp.size)


@torch.no_grad()
def sum_gradients(gradients: Sequence[Tensor], tp: TensorGroup) -> None:
    """Sum gradients of one dtype over the group in place, several in one all-reduce, to the same bits on all ranks."""
    bucket: list[Tensor] = []
    for index, gradient in enumerate(gradients):
        bucket.append(gradient)
        if sum(each.numel() for each in bucket) < _BUCKET_VALUES and index + 1 < len(gradients):
            continue
        sums = all_reduce(torch.cat([each.flatten() for each in bucket]), tp)
        for each, total in zip(bucket, sums.split([each.numel() for each in bucket]), strict=True):
            each.copy_(total.view_as(each))
        bucket = []


def all_reduce(x: Tensor, tp: TensorGroup, operation: str = "sum") -> Tensor:
    """The sum ("sum") or maximum ("max") of the ranks' x as a new tensor of its shape and dtype; not differentiable."""
    return x if tp.size == 1 else _all_reduce(x, operation, _name(tp), tp.size)


def exchange(outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[int], like: Tensor, group: StageGroup) -> Tensor:
    """Send flat tensors to every rank and return what they sent here, [sum of incoming], in the order of ranks.

    `outgoing`: by destination. `incoming`: the number of values, by origin. All of dtype and device of `like`. What
    stays on this rank is not counted as sent.
    """
    send = torch.cat([tensor for tensors in outgoing for tensor in tensors] or [like.new_empty(0)])
    splits = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
    _record("exchange", (send.numel() - splits[group.rank]) * send.element_size())
    received = like.new_empty(sum(incoming))
    dist.all_to_all_single(received, send, list(incoming), splits, group=group.group)
    return received


def _name(tp: TensorGroup) -> str:
    assert tp.group is not None, "a tensor-parallel group of more than one rank needs a process group"
    return tp.group.group_name


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _all_gather(x, group, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(gradients[0], ctx.group, ctx.size), None, None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _reduce_scatter(x, group, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(gradients[0], ctx.group, ctx.size), None, None


class _AllToAll(torch.autograd.Function):
    """Chunk i of dimension 0 goes to rank i: its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _all_to_all(x, group, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _all_to_all(gradients[0], ctx.group, ctx.size), None, None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, group: str, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _all_reduce(gradients[0], "sum", ctx.group, ctx.size), None, None


def _group(name: str) -> dist.ProcessGroup:
    # Operators take no process group; its name is how torch.distributed's own operators get theirs.
    return _resolve_process_group(cast(Any, name))


def _record(operation: str, num_bytes: int) -> None:
    if _records is not None:
        _records.append((operation, num_bytes))


@torch.library.custom_op("megastruct::all_gather", mutates_args=())
def _all_gather(x: Tensor, group: str, size: int) -> Tensor:
    """[n, ...] -> [n * tp, ...]"""
    _record("all_gather", (size - 1) * x.nbytes)
    gathered = x.new_empty((x.shape[0] * size, *x.shape[1:]))
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=_group(group))
    return gathered


@_all_gather.register_fake
def _(x: Tensor, group: str, size: int) -> Tensor:
    return x.new_empty((x.shape[0] * size, *x.shape[1:]))


@torch.library.custom_op("megastruct::reduce_scatter", mutates_args=())
def _reduce_scatter(x: Tensor, group: str, size: int) -> Tensor:
    """[n * tp, ...] -> [n, ...]"""
    assert x.shape[0] % size == 0, f"{x.shape[0]} rows for {size} ranks"
    _record("reduce_scatter", (size - 1) * x.nbytes // size)
    own = x.new_empty((x.shape[0] // size, *x.shape[1:]))
    dist.reduce_scatter_tensor(own, x.contiguous(), group=_group(group))
    return own


@_reduce_scatter.register_fake
def _(x: Tensor, group: str, size: int) -> Tensor:
    return x.new_empty((x.shape[0] // size, *x.shape[1:]))


@torch.library.custom_op("megastruct::all_to_all", mutates_args=())
def _all_to_all(x: Tensor, group: str, size: int) -> Tensor:
    """[tp * n, ...] by destination -> [tp * n, ...] by origin"""
    assert x.shape[0] % size == 0, f"{x.shape[0]} rows for {size} ranks"
    _record("all_to_all", (size - 1) * x.nbytes // size)
    received = x.new_empty(x.shape)
    dist.all_to_all_single(received, x.contiguous(), group=_group(group))
    return received


@_all_to_all.register_fake
def _(x: Tensor, group: str, size: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("megastruct::all_reduce", mutates_args=())
def _all_reduce(x: Tensor, operation: str, group: str, size: int) -> Tensor:
    """[...] -> [...]"""
    _record("all_reduce", 2 * (size - 1) * x.nbytes // size)
    reduced = x.clone(memory_format=torch.contiguous_format)
    chosen = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[operation]
    dist.all_reduce(reduced, chosen, group=_group(group))
    return reduced


@_all_reduce.register_fake
def _(x: Tensor, operation: str, group: str, size: int) -> Tensor:
    return x.new_empty(x.shape)


KEPT_COLLECTIVES = (_all_gather, _reduce_scatter, _all_to_all)  # those of a forward, which no second forward runs again
