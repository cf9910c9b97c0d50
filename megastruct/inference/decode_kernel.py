"""A Triton kernel for the attention of one new token per row to the row's cached keys and values.

The kernel is limited by the speed of the GPU's memory. It reads each key and each value once for all query heads that
share them, and only as many as the row has; a kernel made for long queries, or two matrix products, read more. The
softmax is computed while reading (Dao et al., arXiv 2205.14135). If there are fewer heads than the GPU has processors,
the tokens of a head are divided among several programs, and their results are merged afterwards ("split-KV", Dao et
al., Flash-Decoding, 2023).
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = 1.4426950408889634
_MIN_DOT = 16  # smallest side of a matrix product on tensor cores
_PROGRAMS_PER_PROCESSOR = 4  # so that some programs compute while others wait for memory
_MIN_SPLIT = 128  # tokens; below, merging costs more than it saves
_MAX_SPLITS = 32  # so that the results of all parts fit into the registers of one program


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q_pointer,
    k_pointer,
    v_pointer,
    positions_pointer,
    out_pointer,
    maximum_pointer,
    sum_pointer,
    scale,
    head_stride,
    kv_heads,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One key/value head of one row, and one of SPLITS parts of its tokens."""
    head = tl.program_id(0)  # row * kv_heads + key/value head
    split = tl.program_id(1)
    length = tl.load(positions_pointer + head // kv_heads).to(tl.int32) + 1
    part = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    first = split * part
    last = tl.minimum(first + part, length)

    queries = tl.arange(0, PADDED_GROUP)
    features = tl.arange(0, PADDED_WIDTH)
    inside = (queries < GROUP)[:, None] & (features < WIDTH)[None, :]
    own = head.to(tl.int64) * GROUP + queries
    q = tl.load(q_pointer + own[:, None] * WIDTH + features[None, :], mask=inside, other=0.0)
    cached = head.to(tl.int64) * head_stride
    maximum = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    out = tl.zeros([PADDED_GROUP, PADDED_WIDTH], tl.float32)
    for start in range(first, last, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        offsets = cached + tokens[:, None] * WIDTH + features[None, :]
        there = (tokens < last)[:, None] & (features < WIDTH)[None, :]
        k = tl.load(k_pointer + offsets, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where((tokens < last)[None, :], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(maximum - higher)
        v = tl.load(v_pointer + offsets, mask=there, other=0.0)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        total = total * shrink + tl.sum(weights, 1)
        maximum = higher
    if SPLITS == 1:
        out = out / total[:, None]
        tl.store(out_pointer + own[:, None] * WIDTH + features[None, :], out.to(q.dtype), mask=inside)
    else:
        own = own * SPLITS + split
        tl.store(out_pointer + own[:, None] * WIDTH + features[None, :], out, mask=inside)
        tl.store(maximum_pointer + own, maximum, mask=queries < GROUP)
        tl.store(sum_pointer + own, total, mask=queries < GROUP)


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    parts_pointer,
    maximum_pointer,
    sum_pointer,
    out_pointer,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The attention of one query head, from the results of all parts of its tokens."""
    head = tl.program_id(0).to(tl.int64)
    features = tl.arange(0, PADDED_WIDTH)
    parts = head * SPLITS + tl.arange(0, SPLITS)
    maximum = tl.load(maximum_pointer + parts)
    shares = tl.exp2(maximum - tl.max(maximum, 0))  # 0 for a part without tokens
    total = tl.sum(tl.load(sum_pointer + parts) * shares, 0)
    offsets = parts[:, None] * WIDTH + features[None, :]
    out = tl.load(parts_pointer + offsets, mask=(features < WIDTH)[None, :], other=0.0)
    out = tl.sum(out * shares[:, None], 0) / total
    tl.store(out_pointer + head * WIDTH + features, out.to(out_pointer.dtype.element_ty), mask=features < WIDTH)


@torch.library.custom_op("megastruct::attend_to_cache", mutates_args=())
def attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Attention [b, heads, dh] of q [b, heads, dh] to the slots 0 ... `positions` of each row.

    Args:
        q: of the model's dtype; query heads of one key/value head are neighbours.
        keys: contiguous [b, kv_heads, num_slots, dh].
        values: the same shape.
        positions: int64 [b], below num_slots.
    """
    b, kv_heads, num_slots, width = keys.shape
    heads = q.shape[1]
    group, q = heads // kv_heads, q.contiguous()
    padded_width = max(_MIN_DOT, triton.next_power_of_2(width))
    splits = num_splits(b * kv_heads, num_slots, _processors(q.device))
    block, warps, stages = _launch(width, q.dtype)
    out = torch.empty_like(q)
    maximum = total = parts = out  # without splits, only `out` is written
    if splits > 1:
        parts = torch.empty(b, heads, splits, width, dtype=torch.float32, device=q.device)
        maximum, total = parts.new_empty(2, b, heads, splits).unbind()
    _attend[(b * kv_heads, splits)](
        q,
        keys,
        values,
        positions,
        parts,
        maximum,
        total,
        _LOG2_E / math.sqrt(width),
        num_slots * width,
        kv_heads,
        GROUP=group,
        PADDED_GROUP=max(_MIN_DOT, triton.next_power_of_2(group)),
        WIDTH=width,
        PADDED_WIDTH=padded_width,
        BLOCK=block,
        SPLITS=splits,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=warps,
        num_stages=stages,
    )
    if splits > 1:
        _merge[(b * heads,)](
            parts, maximum, total, out, WIDTH=width, PADDED_WIDTH=padded_width, SPLITS=splits, num_warps=4
        )
    return out


@attend.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def num_splits(heads: int, num_slots: int, processors: int) -> int:
    """Parts into which the tokens of a head are divided; a power of two, so that few kernels are compiled."""
    wanted = min(processors * _PROGRAMS_PER_PROCESSOR // heads, num_slots // _MIN_SPLIT, _MAX_SPLITS)
    return 1 << max(0, wanted.bit_length() - 1)


def _launch(width: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Tokens per block, warps and pipeline stages of a program.

    On an H100 the choices read 3.0 TB/s of its 3.35 (bf16, widths 64 and 128, groups of 1 to 6 query heads, 4,096 rows
    of 320 tokens); two matrix products and a softmax reach 2.1 to 2.5, PyTorch's kernel 1.6 to 2.7.
    """
    if dtype == torch.float32 or width > 128:
        return 32, 4, 2
    return (64, 4, 4) if width > 64 else (64, 2, 3)


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
