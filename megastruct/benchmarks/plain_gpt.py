"""The baseline of the step benchmark: the dense decoder of a config as anyone would write it in plain PyTorch.

Nothing of the package's layers is in it. Shapes: b micro-batch, s sequence, d hidden size, dh head width, v vocabulary.
Activations are batch first, [b, s, d].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megastruct.config.activations import ACTIVATIONS
from megastruct.config.model import ModelConfig


class PlainAttention(nn.Module):
    """Causal attention with rotary positions, by PyTorch's scaled_dot_product_attention."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        d, dh, kv = model.hidden_size, model.attention_head_dim, model.kv_heads * model.attention_head_dim
        self.head_dim, self.grouped = dh, model.kv_heads < model.num_attention_heads
        self.query = nn.Linear(d, model.attention_width, bias=model.bias)
        self.key, self.value = (nn.Linear(d, kv, bias=model.bias) for _ in range(2))
        self.out = nn.Linear(model.attention_width, d, bias=model.bias)
        self.query_norm, self.key_norm = (
            nn.RMSNorm(dh, eps=model.norm_eps) if model.qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map x [b, s, d] to [b, s, d]; cos and sin [s, 1, dh / 2]."""
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.query, self.key, self.value))
        q, k = _rotate(self.query_norm(q), cos, sin), _rotate(self.key_norm(k), cos, sin)  # [b, s, heads, dh]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.out(y.transpose(1, 2).flatten(-2))


class PlainMLP(nn.Module):
    """down(activation(up x)); swiglu has its gate in a linear of its own, as in Llama."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        d, f = model.hidden_size, model.ffn_hidden_size
        self.activation = ACTIVATIONS[model.activation].load()
        self.gate = nn.Linear(d, f, bias=model.bias) if model.activation == "swiglu" else None
        self.up = nn.Linear(d, f if self.gate else model.fc1_out_features, bias=model.bias)
        self.down = nn.Linear(f, d, bias=model.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [b, s, d] to [b, s, d]."""
        y = self.activation(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        return self.down(y)


class PlainBlock(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = _norm(model), _norm(model)
        self.attention, self.mlp = PlainAttention(model), PlainMLP(model)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map x [b, s, d] to [b, s, d]; cos and sin [s, 1, dh / 2]."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class PlainGPT(nn.Module):
    """The decoder: embedding, blocks, norm, and a head that may share the embedding's weight."""

    def __init__(self, model: ModelConfig, recompute: bool = False) -> None:
        """`recompute`: keep only the inputs of blocks for the backward."""
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(model) for _ in range(model.num_layers))
        self.final_norm = _norm(model)
        self.head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        self.tied, self.logit_scale = model.tie_embeddings, model.logit_scale
        self.rope_base, self.head_dim = model.rope_base, model.attention_head_dim
        self.tie()

    def tie(self) -> None:
        """Have the head share the embedding's weight, if the config says so."""
        if self.tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids int64 [b, s] to logits [b, s, v]."""
        x = self.embedding(ids)
        if torch.is_autocast_enabled(ids.device.type):  # otherwise the residual stream and its sums stay in fp32
            x = x.to(torch.get_autocast_dtype(ids.device.type))
        cos, sin = self._angles(ids.shape[1], ids.device)
        for block in self.blocks:
            x = checkpoint(block, x, cos, sin, use_reentrant=False) if self.recompute else block(x, cos, sin)
        x = self.final_norm(x)
        return self.head(x if self.logit_scale == 1.0 else x * self.logit_scale)

    def _angles(self, seq_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device) / self.head_dim
        positions = torch.arange(seq_length, dtype=torch.float64, device=device)
        angles = torch.outer(positions, self.rope_base**-exponents)
        return angles.cos().float()[:, None], angles.sin().float()[:, None]


def _norm(model: ModelConfig) -> nn.Module:
    if model.norm == "rmsnorm":
        return nn.RMSNorm(model.hidden_size, eps=model.norm_eps)
    return nn.LayerNorm(model.hidden_size, eps=model.norm_eps, bias=model.bias)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
