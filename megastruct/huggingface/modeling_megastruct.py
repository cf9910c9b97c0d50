"""A decoder whose feed-forward layers are structured matrices, for transformers (`trust_remote_code=True`).

This file is part of exported models and needs torch and transformers only. Structures, with N inputs and M outputs:

    dense          y = W x
    lowrank        y = U V x                V [R, N], U [M, R]
    blockdense     y = U V_b x              V_b block-diagonal, v [B, R/B, N/B], U [M, R]
    blockshuffle   y = f^-1 U_b f V_b x     both block-diagonal, v [B, K/B, N/B], u [B, M/B, K/B], K = min(N, M)

Source: arXiv 2406.16450. Letters: b batch, s tokens, t tokens with those in the cache, d hidden size, dh head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast


class MegastructConfig(PretrainedConfig):
    """Sizes of the decoder.

    `structure` and `structure_sizes` are those of both linears of a feed-forward layer, except for the first layer if
    `dense_first_block`. `gated`: the first linear makes gate and value, in alternating rows, for SwiGLU. `qk_norm`:
    each head of q and k goes through an RMSNorm before it is rotated. The logits are multiplied by `logit_scale`.
    """

    model_type = "megastruct"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int = 12,
        head_dim: int = 64,
        max_position_embeddings: int = 1024,
        norm: str = "layernorm",
        norm_eps: float = 1e-5,
        gated: bool = False,
        qk_norm: bool = False,
        bias: bool = True,
        rope_theta: float = 10000.0,
        logit_scale: float = 1.0,
        structure: str = "dense",
        structure_sizes: dict[str, int] | None = None,
        dense_first_block: bool = True,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads, self.head_dim = num_key_value_heads, head_dim
        self.max_position_embeddings, self.dense_first_block = max_position_embeddings, dense_first_block
        self.norm, self.norm_eps, self.gated, self.qk_norm, self.bias = norm, norm_eps, gated, qk_norm, bias
        self.logit_scale, self.initializer_range, self.use_cache = logit_scale, initializer_range, use_cache
        self.rope_theta, self.structure, self.structure_sizes = rope_theta, structure, structure_sizes or {}
        super().__init__(**kwargs)


class LowRank(nn.Module):
    """y = U V x + b."""

    def __init__(self, n: int, m: int, bias: bool, rank: int) -> None:
        super().__init__()
        self.v, self.u = nn.Parameter(torch.empty(rank, n)), nn.Parameter(torch.empty(m, rank))
        self.bias = nn.Parameter(torch.zeros(m)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., N] to [..., M]."""
        return F.linear(F.linear(x, self.v), self.u, self.bias)


class BlockDense(nn.Module):
    """y = U V_b x + b."""

    def __init__(self, n: int, m: int, bias: bool, nblocks: int, rank: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.empty(nblocks, rank // nblocks, n // nblocks))
        self.u = nn.Parameter(torch.empty(m, rank))
        self.bias = nn.Parameter(torch.zeros(m)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., N] to [..., M]."""
        by_block = x.unflatten(-1, (len(self.v), -1))  # [..., B, N/B]
        hidden = torch.einsum("...bn,brn->...br", by_block, self.v)  # [..., B, R/B]
        return F.linear(hidden.flatten(-2), self.u, self.bias)


class BlockShuffle(nn.Module):
    """y = f^-1 U_b f V_b x + b: feature r*B + l between the factors is row r of block l of U_b."""

    def __init__(self, n: int, m: int, bias: bool, nblocks: int) -> None:
        super().__init__()
        k = min(n, m) // nblocks
        self.v = nn.Parameter(torch.empty(nblocks, k, n // nblocks))
        self.u = nn.Parameter(torch.empty(nblocks, m // nblocks, k))
        self.bias = nn.Parameter(torch.zeros(m)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., N] to [..., M]."""
        nblocks = len(self.v)
        hidden = torch.einsum("...bn,bkn->...bk", x.unflatten(-1, (nblocks, -1)), self.v)  # [..., B, K/B]
        hidden = hidden.flatten(-2).unflatten(-1, (-1, nblocks))  # f: [..., K/B, B]
        y = torch.einsum("...kb,bmk->...mb", hidden, self.u).flatten(-2)  # f^-1 on [..., M/B, B]
        return y if self.bias is None else y + self.bias


STRUCTURES: dict[str, Callable[..., nn.Module]] = {
    "dense": nn.Linear,
    "lowrank": LowRank,
    "blockdense": BlockDense,
    "blockshuffle": BlockShuffle,
}


class MLP(nn.Module):
    """fc2(activation(fc1 x))."""

    def __init__(self, config: MegastructConfig, dense: bool) -> None:
        super().__init__()
        structure = STRUCTURES["dense" if dense else config.structure]
        sizes = {} if dense else config.structure_sizes
        d, f, self.gated = config.hidden_size, config.intermediate_size, config.gated
        self.fc1 = structure(d, 2 * f if self.gated else f, bias=config.bias, **sizes)
        self.fc2 = structure(f, d, bias=config.bias, **sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [b, s, d] to [b, s, d]."""
        y = self.fc1(x)
        if not self.gated:
            return self.fc2(F.gelu(y, approximate="tanh"))
        gate, value = y.unflatten(-1, (-1, 2)).unbind(-1)
        return self.fc2(F.silu(gate) * value)


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: MegastructConfig, index: int) -> None:
        super().__init__()
        d, self.head_dim, self.index = config.hidden_size, config.head_dim, index
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.grouped = kv_heads != heads
        self.query = nn.Linear(d, heads * self.head_dim, bias=config.bias)
        self.key = nn.Linear(d, kv_heads * self.head_dim, bias=config.bias)
        self.value = nn.Linear(d, kv_heads * self.head_dim, bias=config.bias)
        self.out = nn.Linear(heads * self.head_dim, d, bias=config.bias)
        norm = nn.RMSNorm if config.qk_norm else nn.Identity
        self.query_norm, self.key_norm = norm(self.head_dim, config.norm_eps), norm(self.head_dim, config.norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any) -> Tensor:
        """Map x [b, s, d] to [b, s, d]; keys and values are added to the cache."""
        by_head = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.query, self.key, self.value))
        q, k, v = (t.transpose(1, 2) for t in by_head)  # [b, heads, s, dh]
        q, k = rotate(self.query_norm(q), *rotary), rotate(self.key_norm(k), *rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.index)  # [b, kv_heads, t, dh]
        causal = mask is None and q.shape[2] > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(GradientCheckpointingLayer):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: MegastructConfig, index: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = make_norm(config), Attention(config, index)
        self.mlp_norm, self.mlp = make_norm(config), MLP(config, dense=config.dense_first_block and index == 0)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any) -> Tensor:
        """Map x [b, s, d] to [b, s, d]; keys and values are added to the cache."""
        x = x + self.attention(self.attention_norm(x), rotary, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


class MegastructForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder with its output head, which is the embedding if the config says so."""

    config_class = MegastructConfig
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: MegastructConfig) -> None:
        super().__init__(config)
        d, vocab_size = config.hidden_size, config.vocab_size
        self.embedding = nn.Embedding(vocab_size, d)
        self.blocks = nn.ModuleList([Block(config, index) for index in range(config.num_hidden_layers)])
        self.final_norm = make_norm(config)
        self.head = None if config.tie_word_embeddings else nn.Linear(d, vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        past_key_values: Any = None,  # the name of `cache` in older versions of transformers
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [b, s, vocab_size] of input_ids [b, s], of which only the last `logits_to_keep` if that is not 0,
        or those at its positions. The loss is the mean over labels, or their sum divided by `num_items_in_batch`:
        transformers' Trainer passes it the labels of all accumulated batches, and expects it to be used.

        `attention_mask` [b, t]: 0 for padding, including the tokens in the cache. `position_ids` [b, s]: where they
        start again, so does a document, and attention does not cross its border (without cache and padding only).
        `output_hidden_states`: also the input of each block and of the head, [b, s, d] each. `return_dict` False: a
        tuple. Raises ValueError for a cache of fixed size, and if attention weights are asked for.
        """
        if output_attentions:
            raise ValueError("this model does not return attention weights; leave output_attentions out")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds  # [b, s, d]
        cache = past_key_values if cache is None else cache
        if getattr(cache, "is_compileable", False):
            raise ValueError("this model needs a cache that grows; leave cache_implementation out")
        if self.training and self.blocks[0].gradient_checkpointing:
            cache, use_cache = None, False  # a block that is computed again would add its keys again
        if cache is None and use_cache:
            cache = DynamicCache()
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = make_mask(attention_mask, position_ids, past, x)
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        rotary = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta)
        keeps = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states: Any = ()
        for block in self.blocks:
            states += (x,) if keeps else ()
            x = block(x, rotary, mask, cache)
        x = self.final_norm(x)
        states = (*states, x) if keeps else None
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            x = x[:, logits_to_keep] if isinstance(logits_to_keep, Tensor) else x[:, -logits_to_keep:]
        x = x if self.config.logit_scale == 1.0 else x * self.config.logit_scale
        logits = F.linear(x, self.embedding.weight if self.head is None else self.head.weight)
        loss = None
        if labels is not None:
            predicted, wanted = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            loss = F.cross_entropy(predicted, wanted, reduction="mean" if num_items_in_batch is None else "sum")
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        output, as_dict = CausalLMOutputWithPast(loss, logits, cache, states), self.config.return_dict
        return output if (as_dict if return_dict is None else return_dict) else output.to_tuple()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the embedding."""
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The head, if it is not the embedding."""
        return self.head

    def set_output_embeddings(self, value: Any) -> None:
        """Replace the head."""
        self.head = value

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=self.config.initializer_range)


def make_norm(config: MegastructConfig) -> nn.Module:
    """The norm before attention, MLP and head."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, config.norm_eps, bias=config.bias)


def make_mask(attention_mask: Tensor | None, position_ids: Tensor | None, past: int, x: Tensor) -> Tensor | None:
    """Which of t tokens each of the s tokens x [b, s, d] sees, bool [b or 1, 1, s, t]; None: all up to itself."""
    keys = torch.arange(past + x.shape[1], device=x.device)
    own = keys[past:, None]
    seen = (keys <= own)[None, None]
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None, :].bool()
        return seen | (keys == own)  # padding sees itself, because a row of scores without any would give NaN
    if past:
        return seen if len(own) > 1 else None
    if position_ids is None:
        return None
    documents = F.pad((position_ids.diff(dim=1) != 1).cumsum(1), (1, 0))  # [b, s]
    return seen & (documents[:, None, :, None] == documents[:, None, None, :])


def rotary_tables(position_ids: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cos and sin, float32 [b, 1, s, dh/2], of angles that are computed in float64 where the device has it."""
    dtype = torch.float32 if position_ids.device.type == "mps" else torch.float64
    exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=position_ids.device) / head_dim
    angles = position_ids[:, None, :, None].to(dtype) * base**-exponents
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [b, heads, s, dh] in float32; feature i is paired with feature i + dh/2."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
