"""Documents in a packed row: the document of each token, and the mask that keeps attention inside it.

    ids        | d0 d0 eod | d1 eod | d2 d2 d2        eod ends a document and is its last token
    documents  |  0  0  0  |  1  1  |  2  2  2        a row may begin and end in the middle of one

Shapes: b = micro_batch_size, s = seq_length. Both are made once per micro-batch; all blocks of a stage share the mask.
The GPU kernel takes the mask in blocks of positions and skips blocks of scores that no document covers. Where the
kernel cannot run, the mask is a matrix that is added to the scores.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from megastruct.planning.cost import has_block_kernel

Mask: TypeAlias = Tensor | BlockMask

KERNEL_BLOCK = 128  # positions; the block size that FlexAttention's kernels are tuned for


def document_ids(ids: Tensor, eod_id: int) -> Tensor:
    """The number of documents of the row that end before each token: ids int64 [b, s] -> int32 [b, s]."""
    ends = (ids == eod_id).int()
    return ends.cumsum(1, dtype=torch.int32) - ends


def attention_mask(documents: Tensor, dtype: torch.dtype, head_dim: int) -> Mask:
    """The mask of `documents` int32 [b, s] for attention in `dtype`, on the device of `documents`."""
    in_blocks = documents.is_cuda and dtype != torch.float32 and has_block_kernel(head_dim)
    return block_mask(documents) if in_blocks else dense_mask(documents, dtype)


def dense_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask [b, 1, s, s] of `dtype` to add to scores [b, heads, s queries, s keys], from documents int32 [b, s].

    It is 0 for the token itself and earlier tokens of its document, -inf for all others. A bool mask would not do:
    scaled_dot_product_attention would convert it for every block anew, and keep each result.
    """
    s = documents.shape[1]
    seen = torch.ones(s, s, dtype=torch.bool, device=documents.device).tril()
    seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    return torch.zeros((), dtype=dtype, device=documents.device).masked_fill(~seen, -math.inf)


def block_mask(documents: Tensor, block: int = KERNEL_BLOCK) -> BlockMask:
    """The same mask for FlexAttention, from documents int32 [b, s], in n x n blocks of scores, n = ceil(s / block).

    Documents are numbered in order, so the first and last token of a block of positions tell which blocks it can see.
    Nothing of size s x s is made, and nothing waits for the device.
    """
    s = documents.shape[1]
    first = documents[:, ::block]  # [b, n]: document of each block's first token
    last = torch.cat((documents[:, block - 1 :: block], documents[:, -1:]), 1)[:, : first.shape[1]]
    position = torch.arange(first.shape[1], device=documents.device)
    query, key = position[:, None], position[None, :]
    # A block of queries meets an earlier block of keys if the keys end in the document in which the queries begin. All
    # queries see all keys if both blocks lie in one document.
    earlier = key < query
    meets = (earlier & (first[:, :, None] == last[:, None, :])) | (key == query)  # [b, n, n]
    whole = earlier & (last[:, :, None] == first[:, None, :]) & (query < s // block)

    def seen(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (documents[b, q] == documents[b, k])

    return BlockMask.from_kv_blocks(
        *_listed(meets & ~whole), *_listed(whole), BLOCK_SIZE=block, mask_mod=seen, seq_lengths=(s, s)
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """From bool [b, n, n], the number of chosen key blocks of each query block, [b, 1, n], and their list, [b, 1, n,
    n].

    The list continues with the key blocks that are not chosen.
    """
    chosen = chosen[:, None].int()
    return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).int()
