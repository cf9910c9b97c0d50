"""The batch that every reader yields.

Letters for shapes: b = micro_batch_size, s = seq_length.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class Batch(NamedTuple):
    """One micro-batch of one data-parallel rank; `labels[i, j]` is the token that follows `ids[i, j]`.

    There is no padding and no mask: every position has a label.
    """

    ids: torch.Tensor  # int64 [b, s], contiguous, on the CPU
    labels: torch.Tensor  # int64 [b, s], contiguous, on the CPU


def batch_from_rows(rows: np.ndarray) -> Batch:
    """Split int64 rows [b, s + 1] into inputs (all but the last token) and labels (all but the first)."""
    return Batch(
        ids=torch.from_numpy(np.ascontiguousarray(rows[:, :-1])),
        labels=torch.from_numpy(np.ascontiguousarray(rows[:, 1:])),
    )
