"""Rotary position embedding, Su et al. 2021 (arXiv 2104.09864), in the half-split layout of GPT-NeoX and LLaMA."""

from __future__ import annotations

import torch
from torch import Tensor


class Rotary:
    """Angles position * base^(-2i/d), in float32 for every dtype of the model: bf16 cannot tell late positions apart.

    It is neither a module nor a buffer, so a cast of the model does not change the tables. They are made when a length
    and device are first used.
    """

    def __init__(self, head_dim: int, base: float) -> None:
        self.head_dim, self.base = head_dim, base
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def tables(self, seq_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin), each float32 [s, 1, 1, head_dim / 2]."""
        key = (seq_length, device)
        if key not in self._tables:
            self._tables[key] = self._make(seq_length, device)
        return self._tables[key]

    @torch.inference_mode(False)  # tables that are first used for inference serve training, too
    def _make(self, seq_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        angles = torch.outer(torch.arange(seq_length, dtype=torch.float64), self.base**-exponents)
        cos, sin = (table.float().to(device)[:, None, None] for table in (angles.cos(), angles.sin()))
        return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [s, b, heads, head_dim] by the angles of its positions; shape and dtype stay.

    Feature i is paired with feature i + head_dim / 2. cos and sin are float32 [s, 1, 1, head_dim / 2].
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
