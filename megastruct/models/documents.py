"""Documents in a packed row: which one a token belongs to, and the mask that keeps attention inside of it.

    ids        | d0 d0 eod | d1 eod | d2 d2 d2        eod ends a document and is its last token
    documents  |  0  0  0  |  1  1  |  2  2  2        a row may begin and end in the middle of one

Shapes: b = micro_batch_size, s = seq_length. Both are made once per micro-batch; all blocks of a stage share the mask.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def document_ids(ids: Tensor, eod_id: int) -> Tensor:
    """ids int64 [b, s] -> int32 [b, s]: how many documents of the row have ended before each token."""
    ends = (ids == eod_id).int()
    return ends.cumsum(1, dtype=torch.int32) - ends


def document_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """documents int32 [b, s] -> [b, 1, s, s], to be added to scores [b, heads, s of queries, s of keys]: 0 for a
    token's own and earlier ones of its document, -inf for all others.

    Not of bool, because scaled_dot_product_attention would make this of it and keep it, for every block anew.
    """
    s = documents.shape[1]
    seen = torch.ones(s, s, dtype=torch.bool, device=documents.device).tril()
    seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    return torch.zeros((), dtype=dtype, device=documents.device).masked_fill(~seen, -math.inf)
