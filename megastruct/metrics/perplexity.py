"""The perplexity of a loss."""

from __future__ import annotations

import math

_MAX_EXPONENT = 700.0  # a larger one overflows a float


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats; of a very large one, that of 700."""
    return math.exp(min(loss, _MAX_EXPONENT))
