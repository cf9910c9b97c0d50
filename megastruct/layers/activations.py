"""The functions between the two linears of a feed-forward network; `config/activations.py` lists them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gelu(y: Tensor) -> Tensor:
    """[..., f] -> [..., f], by the tanh approximation. Source: Hendrycks and Gimpel 2016 (arXiv 1606.08415)."""
    return F.gelu(y, approximate="tanh")


def swiglu(y: Tensor) -> Tensor:
    """[..., 2f] -> [..., f]: silu(gate) * value. Source: Shazeer 2020 (arXiv 2002.05202)."""
    gate, value = y.unflatten(-1, (-1, 2)).unbind(-1)
    return F.silu(gate) * value
