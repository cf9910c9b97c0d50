"""Documents in a packed row: which one a token belongs to, and the mask that keeps attention inside of it.

    ids        | d0 d0 eod | d1 eod | d2 d2 d2        eod ends a document and is its last token
    documents  |  0  0  0  |  1  1  |  2  2  2        a row may begin and end in the middle of one

Shapes: b = micro_batch_size, s = seq_length. Both are made once per micro-batch; all blocks of a stage share the mask.
A GPU's kernel takes it in blocks of positions and leaves out the blocks of scores that no document has; where that
kernel cannot run it is a matrix that is added to the scores.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from megastruct.planning.cost import has_block_kernel

Mask: TypeAlias = Tensor | BlockMask

KERNEL_BLOCK = 128  # positions; what FlexAttention's kernels are tuned for


def document_ids(ids: Tensor, eod_id: int) -> Tensor:
    """ids int64 [b, s] -> int32 [b, s]: how many documents of the row have ended before each token."""
    ends = (ids == eod_id).int()
    return ends.cumsum(1, dtype=torch.int32) - ends


def attention_mask(documents: Tensor, dtype: torch.dtype, head_dim: int) -> Mask:
    """The mask of `documents` int32 [b, s] for attention in `dtype` on their device."""
    in_blocks = documents.is_cuda and dtype != torch.float32 and has_block_kernel(head_dim)
    return block_mask(documents) if in_blocks else dense_mask(documents, dtype)


def dense_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """documents int32 [b, s] -> [b, 1, s, s], to be added to scores [b, heads, s of queries, s of keys]: 0 for a
    token's own and earlier ones of its document, -inf for all others.

    Not of bool, because scaled_dot_product_attention would make this of it and keep it, for every block anew.
    """
    s = documents.shape[1]
    seen = torch.ones(s, s, dtype=torch.bool, device=documents.device).tril()
    seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    return torch.zeros((), dtype=dtype, device=documents.device).masked_fill(~seen, -math.inf)


def block_mask(documents: Tensor, block: int = KERNEL_BLOCK) -> BlockMask:
    """documents int32 [b, s] -> the same mask for FlexAttention, in n x n blocks of scores, n = ceil(s / block).

    Documents are numbered in order, so the first and the last token of a block of positions tell which blocks it
    meets: nothing of size s x s is made, and nothing waits for the device.
    """
    s = documents.shape[1]
    first = documents[:, ::block]  # [b, n]: document of each block's first token
    last = torch.cat((documents[:, block - 1 :: block], documents[:, -1:]), 1)[:, : first.shape[1]]
    position = torch.arange(first.shape[1], device=documents.device)
    query, key = position[:, None], position[None, :]
    # An earlier block of keys meets a block of queries if its last document is the one the queries begin in, and all
    # of it is seen by all of them if both lie in one document.
    earlier = key < query
    meets = (earlier & (first[:, :, None] == last[:, None, :])) | (key == query)  # [b, n, n]
    whole = earlier & (last[:, :, None] == first[:, None, :]) & (query < s // block)

    def seen(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (documents[b, q] == documents[b, k])

    return BlockMask.from_kv_blocks(
        *_listed(meets & ~whole), *_listed(whole), BLOCK_SIZE=block, mask_mod=seen, seq_lengths=(s, s)
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """[b, n, n] bool -> for each block of queries the number of its blocks of keys, [b, 1, n], and their list, which
    goes on with the others, [b, 1, n, n]."""
    chosen = chosen[:, None].int()
    return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).int()
