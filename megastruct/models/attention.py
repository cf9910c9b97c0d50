"""Causal self-attention with rotary positions and grouped key/value heads, of its own width a."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megastruct.layers.linear import LinearBuilder
from megastruct.layers.rotary import Rotary, rotate


class Attention(nn.Module):
    """q [h -> heads x dh], k and v [h -> kv_heads x dh], out [heads x dh -> h]."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope_base: float,
        linear: LinearBuilder,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.grouped = num_kv_heads < num_heads
        self.query = linear(hidden_size, num_heads * head_dim)
        self.key = linear(hidden_size, num_kv_heads * head_dim)
        self.value = linear(hidden_size, num_kv_heads * head_dim)
        self.out = linear(num_heads * head_dim, hidden_size)
        self.rotary = Rotary(head_dim, rope_base)

    def forward(self, x: Tensor) -> Tensor:
        """x [s, b, h] -> [s, b, h]"""
        s, b, _ = x.shape
        cos, sin = self.rotary.tables(s, x.device)
        q = rotate(self.query(x).view(s, b, -1, self.head_dim), cos, sin)  # [s, b, heads, dh]
        k = rotate(self.key(x).view(s, b, -1, self.head_dim), cos, sin)  # [s, b, kv_heads, dh]
        v = self.value(x).view(s, b, -1, self.head_dim)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))  # [b, heads, s, dh]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.out(y.permute(2, 0, 1, 3).reshape(s, b, -1))  # [s, b, a] -> [s, b, h]
