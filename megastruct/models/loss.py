"""Next-token cross-entropy."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [s, b, v] of any float dtype, labels int64 [b, s] -> float32 scalar, mean over the b x s tokens.

    Every row is full, so the mean of micro-batch means is the mean over all tokens.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), labels.t().reshape(-1))
