"""The decoder as a flat list of named layers, built from a config, and as one module.

The list is the only description of the model: `GPT` runs it as one module, `pipeline.py` cuts it into stages. A
layer's name in the list is its name in checkpoints and in random seeds, for every layout. All layers are the
tensor-parallel ones; a group of one rank makes them the plain ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from megastruct.config.schema import Config, ModelConfig
from megastruct.layers import LinearBuilder
from megastruct.models.attention import Attention
from megastruct.models.block import Block
from megastruct.models.mlp import MLP
from megastruct.parallel.groups import TensorGroup
from megastruct.tensor_parallel import (
    COLUMN_LINEARS,
    ROW_LINEARS,
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    SequenceParallelLayerNorm,
    SequenceParallelRMSNorm,
    VocabParallelEmbedding,
    VocabParallelHead,
)

EMBEDDING = "embedding"
HEAD = "head"
ALONE = TensorGroup()


@dataclass(frozen=True)
class NamedLayer:
    """A layer to be built: its global name, and what makes it."""

    name: str
    build: Callable[[], nn.Module]


def named_layers(config: Config, tp: TensorGroup) -> list[NamedLayer]:
    """embedding, blocks.0 ..., final_norm, and head unless it is the embedding's weight."""
    model = config.model
    d, vocab, std = model.hidden_size, model.vocab_size, model.init_std
    layers = [NamedLayer(EMBEDDING, partial(VocabParallelEmbedding, vocab, d, tp, std))]
    layers += [NamedLayer(f"blocks.{i}", partial(_build_block, config, i, tp)) for i in range(model.num_layers)]
    layers += [NamedLayer("final_norm", partial(_build_norm, model, tp))]
    if not model.tie_embeddings:
        layers += [NamedLayer(HEAD, partial(VocabParallelHead, d, vocab, tp, std))]
    return layers


class GPT(nn.Module):
    """The whole decoder, without a pipeline: ids int64 [b, s] -> logits [s, b, v/tp]."""

    def __init__(self, config: Config, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        layers = named_layers(config, tp)
        self.layer_names = [layer.name for layer in layers]
        self.blocks = nn.ModuleDict()
        for layer in layers:
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


def build_gpt(config: Config, tp: TensorGroup = ALONE) -> GPT:
    """The decoder in float32, with (this rank's part of) the weights of the run's seed."""
    model = GPT(config, tp)
    for name in model.layer_names:
        init_weights(model.get_submodule(name), name, config.run.seed)
    return model


def _build_norm(model: ModelConfig, tp: TensorGroup) -> nn.Module:
    if model.norm == "rmsnorm":
        return SequenceParallelRMSNorm(model.hidden_size, tp, model.norm_eps)
    return SequenceParallelLayerNorm(model.hidden_size, tp, model.norm_eps, bias=model.bias)


def _build_block(config: Config, index: int, tp: TensorGroup) -> Block:
    model, common = config.model, {"tp": tp, "bias": config.model.bias, "init_std": config.model.init_std}
    attention = Attention(
        model.hidden_size,
        model.num_attention_heads,
        model.kv_heads,
        model.attention_head_dim,
        model.rope_base,
        column=partial(ColumnParallelLinear, gather_input=False, **common),
        row=partial(RowParallelLinear, **common),
        replicated=partial(ReplicatedLinear, **common),
        tp=tp,
    )
    ffn = config.ffn.of_block(index)
    fc1: LinearBuilder = partial(COLUMN_LINEARS[ffn.structure], **ffn.sizes, **common)
    fc2: LinearBuilder = partial(ROW_LINEARS[ffn.structure], **ffn.sizes, **common)
    mlp = MLP(model.hidden_size, model.ffn_hidden_size, model.activation == "swiglu", fc1, fc2)
    norms = (_build_norm(model, tp), _build_norm(model, tp))
    return Block(attention, mlp, *norms, recompute=config.training.activation_checkpointing)
