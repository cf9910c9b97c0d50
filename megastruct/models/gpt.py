"""The decoder as a flat list of named layers, built from a config, and as one module.

The list is the only description of the model: `GPT` runs it in one process, `pipeline.py` cuts it into stages. A
layer's name in the list is its name in checkpoints and in random seeds, for every layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from megastruct.config.schema import Config, FFNConfig, ModelConfig
from megastruct.layers import Embedding, LayerNorm, Linear, LinearBuilder, LowRankLinear, RMSNorm
from megastruct.models.attention import Attention
from megastruct.models.block import Block
from megastruct.models.mlp import MLP

EMBEDDING = "embedding"
HEAD = "head"


@dataclass(frozen=True)
class NamedLayer:
    """A layer to be built: its global name, and what makes it."""

    name: str
    build: Callable[[], nn.Module]


def named_layers(config: Config) -> list[NamedLayer]:
    """embedding, blocks.0 ..., final_norm, and head unless it is the embedding's weight."""
    model = config.model
    layers = [NamedLayer(EMBEDDING, partial(Embedding, model.vocab_size, model.hidden_size, model.init_std))]
    layers += [NamedLayer(f"blocks.{i}", partial(_build_block, config, i)) for i in range(model.num_layers)]
    layers += [NamedLayer("final_norm", partial(_build_norm, model))]
    if not model.tie_embeddings:
        head = partial(Linear, model.hidden_size, model.vocab_size, bias=False, init_std=model.init_std)
        layers += [NamedLayer(HEAD, head)]
    return layers


class GPT(nn.Module):
    """The whole decoder in one process: ids int64 [b, s] -> logits [s, b, v]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layer_names = [layer.name for layer in named_layers(config)]
        self.blocks = nn.ModuleDict()
        for layer in named_layers(config):
            parent, _, name = layer.name.rpartition(".")
            (self.get_submodule(parent) if parent else self).add_module(name, layer.build())
        self.tied = config.model.tie_embeddings

    def forward(self, ids: Tensor) -> Tensor:
        x = ids
        for name in self.layer_names:
            x = self.get_submodule(name)(x)
        return self.get_submodule(EMBEDDING).project(x) if self.tied else x


@torch.no_grad()
def init_weights(layer: nn.Module, layer_name: str, seed: int) -> None:
    """Fill all weights of one named layer from streams named by (seed, full name of the module)."""
    for name, module in layer.named_modules():
        if hasattr(module, "init_weights"):
            module.init_weights((seed, "weights", f"{layer_name}.{name}" if name else layer_name))


def build_gpt(config: Config) -> GPT:
    """The decoder in one process, in float32, with the weights of the run's seed."""
    model = GPT(config)
    for name in model.layer_names:
        init_weights(model.get_submodule(name), name, config.run.seed)
    return model


def dense_builder(model: ModelConfig) -> LinearBuilder:
    return partial(Linear, bias=model.bias, init_std=model.init_std)


def ffn_builder(model: ModelConfig, ffn: FFNConfig, block_index: int) -> LinearBuilder:
    """Makes both FFN linears of a block; the first block may keep its dense ones (paper, section 4.1)."""
    if ffn.structure == "dense" or (block_index == 0 and ffn.dense_first_block):
        return dense_builder(model)
    assert ffn.rank is not None  # config/checks.py
    return partial(LowRankLinear, rank=ffn.rank, bias=model.bias, init_std=model.init_std)


def _build_norm(model: ModelConfig) -> nn.Module:
    if model.norm == "rmsnorm":
        return RMSNorm(model.hidden_size, model.norm_eps)
    return LayerNorm(model.hidden_size, model.norm_eps, bias=model.bias)


def _build_block(config: Config, index: int) -> Block:
    model = config.model
    attention = Attention(
        model.hidden_size,
        model.num_attention_heads,
        model.kv_heads,
        model.attention_head_dim,
        model.rope_base,
        dense_builder(model),
    )
    mlp = MLP(
        model.hidden_size,
        model.ffn_hidden_size,
        gated=model.activation == "swiglu",
        linear=ffn_builder(model, config.ffn, index),
    )
    norms = (_build_norm(model), _build_norm(model))
    return Block(attention, mlp, *norms, recompute=config.training.activation_checkpointing)
