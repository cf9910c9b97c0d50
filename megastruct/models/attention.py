"""Causal self-attention with rotary positions and grouped key/value heads; its width a may differ from h.

Under tensor parallelism a rank has heads/tp query heads and their key/value heads. Between blocks a rank holds its
part of the sequence; inside the attention it has the whole sequence for its own heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megastruct.layers.rotary import Rotary, rotate
from megastruct.models.documents import Mask
from megastruct.parallel.collectives import gather_sequence
from megastruct.parallel.groups import TensorGroup
from megastruct.structures.sharded import LinearBuilder


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


class Attention(nn.Module):
    """Projections q [h -> heads x dh], k and v [h -> kv_heads x dh], out [heads x dh -> h].

    `column` builds a linear whose outputs are sharded over the group (its input is the whole sequence), `row` one whose
    inputs are. If the ranks do not divide the key/value heads, `replicated` builds whole k and v on every rank.
    `head_norm` builds what normalises each head of q and of k, [..., dh], before the rotary embedding: one module for
    all heads of q, and one for those of k.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope_base: float,
        column: LinearBuilder,
        row: LinearBuilder,
        replicated: LinearBuilder,
        head_norm: Callable[[int], nn.Module],
        tp: TensorGroup,
    ) -> None:
        super().__init__()
        self.head_dim, self.tp = head_dim, tp
        local_heads, queries_per_kv = num_heads // tp.size, num_heads // num_kv_heads
        cut = num_kv_heads % tp.size == 0
        self.grouped = cut and queries_per_kv > 1
        # With key/value heads on every rank: which of them each local query head takes.
        first = tp.rank * local_heads
        self.kv_of_query = None if cut else [(first + i) // queries_per_kv for i in range(local_heads)]
        self.query = column(hidden_size, num_heads * head_dim)
        self.key, self.value = ((column if cut else replicated)(hidden_size, num_kv_heads * head_dim) for _ in range(2))
        self.query_norm, self.key_norm = head_norm(head_dim), head_norm(head_dim)
        self.out = row(num_heads * head_dim, hidden_size)
        self.rotary = Rotary(head_dim, rope_base)

    def forward(self, x: Tensor, mask: Mask | None = None) -> Tensor:
        """Map x [s/tp, b, h] to [s/tp, b, h].

        `mask` (models/documents.py) says what each token sees; without a mask it sees itself and all earlier tokens.
        """
        x = gather_sequence(x, self.tp)  # [s, b, h]
        q, k, v = self.project(x, *self.rotary.tables(len(x), x.device))
        if self.kv_of_query is not None:
            k, v = k[:, :, self.kv_of_query], v[:, :, self.kv_of_query]  # [s, b, heads/tp, dh]
        return self.attend(q, k, v, mask)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q [s, b, heads/tp, dh], k and v [s, b, kv_heads/tp or kv_heads, dh] of x [s, b, h].

        Heads of q and k are normalised, if they have norms, then rotated.

        cos and sin: float32 [s, 1, 1, dh / 2], or [s, b, 1, dh / 2] if the rows are at different positions.
        """
        s, b, _ = x.shape
        q = rotate(self.query_norm(self.query(x).view(s, b, -1, self.head_dim)), cos, sin)
        k = rotate(self.key_norm(self.key(x).view(s, b, -1, self.head_dim)), cos, sin)
        return q, k, self.value(x).view(s, b, -1, self.head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
        """The output [s/tp, b, h] of q [s, b, heads/tp, dh], k and v [s, b, heads/tp or kv_heads/tp, dh]."""
        s, b = q.shape[:2]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))  # [b, heads/tp, s, dh]
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        elif isinstance(mask, BlockMask):
            # Uncompiled, it would compute and keep all scores. A compiled block compiles it along with the rest.
            attend: Callable[..., Any] = flex_attention
            if not torch.compiler.is_compiling():
                attend = _compiled_flex_attention()
            y = attend(q, k, v, block_mask=mask, enable_gqa=self.grouped)
        else:
            # Keys and values are copied for every query head: the only kernel of PyTorch for GPUs that takes both a
            # mask and groups keeps all scores.
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) if self.grouped else t for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.permute(2, 0, 1, 3).reshape(s, b, -1))  # [s, b, a/tp] -> [s/tp, b, h]
