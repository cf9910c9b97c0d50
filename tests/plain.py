"""The model in plain PyTorch, written out from the paper's description with other means than the package's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megastruct.config.schema import Config


def dense_weight(w: dict[str, Tensor], name: str) -> Tensor:
    """[M, N], structured ones multiplied out from their definition with matrices of the whole size."""
    if f"{name}.weight" in w:
        return w[f"{name}.weight"]
    v, u = w[f"{name}.v"], w[f"{name}.u"]
    if v.ndim == 2:
        return u @ v
    if u.ndim == 2:
        return u @ torch.block_diag(*v)
    nblocks = len(u)

    def shuffle(features: int) -> Tensor:  # row l * (features / B) + r picks feature r * B + l
        order = [r * nblocks + block for block in range(nblocks) for r in range(features // nblocks)]
        return torch.eye(features, dtype=v.dtype)[order]

    inner, outer = shuffle(u.shape[2] * nblocks), shuffle(u.shape[1] * nblocks)
    return outer.T @ torch.block_diag(*u) @ inner @ torch.block_diag(*v)


def plain_model(config: Config, w: dict[str, Tensor], ids: Tensor) -> Tensor:
    """ids [s] of one sequence -> logits [s, v], position by position and head by head."""
    m = config.model
    dh, heads, kv_heads = m.attention_head_dim, m.num_attention_heads, m.kv_heads

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ dense_weight(w, name).T
        return y + w[f"{name}.bias"] if m.bias else y

    def norm(x: Tensor, name: str) -> Tensor:
        if m.norm == "rmsnorm":
            return x / (x.pow(2).mean(-1, keepdim=True) + m.norm_eps).sqrt() * w[f"{name}.weight"]
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + m.norm_eps).sqrt()
        return x * w[f"{name}.weight"] + (w[f"{name}.bias"] if m.bias else 0)

    def head_norm(x: Tensor, name: str) -> Tensor:  # [s, dh]
        if not m.qk_norm:
            return x
        return x / (x.pow(2).mean(-1, keepdim=True) + m.norm_eps).sqrt() * w[f"{name}.weight"]

    def rope(x: Tensor) -> Tensor:  # [s, dh]: complex numbers turned by position * base^(-2i/dh)
        z = torch.complex(x[:, : dh // 2], x[:, dh // 2 :])
        frequency = torch.tensor([m.rope_base ** (-2 * i / dh) for i in range(dh // 2)], dtype=torch.float64)
        z = z * torch.polar(torch.ones(()).double(), torch.arange(len(x)).double()[:, None] * frequency)
        return torch.cat((z.real, z.imag), -1)

    x = w["embedding.weight"][ids]
    for i in range(m.num_layers):
        block = f"blocks.{i}"
        y = norm(x, f"{block}.attention_norm")
        q, k, v = (linear(y, f"{block}.attention.{name}") for name in ("query", "key", "value"))
        outs = []
        for h in range(heads):
            g = h * kv_heads // heads  # neighbouring query heads share a key/value head
            qh = rope(head_norm(q[:, h * dh : (h + 1) * dh], f"{block}.attention.query_norm"))
            kh = rope(head_norm(k[:, g * dh : (g + 1) * dh], f"{block}.attention.key_norm"))
            scores = qh @ kh.T / math.sqrt(dh)
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            outs.append(scores.softmax(-1) @ v[:, g * dh : (g + 1) * dh])
        x = x + linear(torch.cat(outs, -1), f"{block}.attention.out")
        y = linear(norm(x, f"{block}.mlp_norm"), f"{block}.mlp.fc1")
        if m.activation == "swiglu":
            gate, value = y[:, 0::2], y[:, 1::2]
            y = gate * torch.sigmoid(gate) * value
        else:
            y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + linear(y, f"{block}.mlp.fc2")
    head = w["embedding.weight"] if m.tie_embeddings else w["head.weight"]
    return norm(x, "final_norm") @ head.T
