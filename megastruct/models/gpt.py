"""The decoder as a flat list of named layers, built from a config, and as one module.

The list is the only description of the model: `GPT` runs it as one module, `engine/pipeline.py` cuts it into stages. A
layer's name in the list is its name in checkpoints and in random seeds, for every layout. All layers are the
tensor-parallel ones; a group of one rank makes them the plain ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypedDict, cast

from torch import Tensor, nn

from megastruct.config.activations import ACTIVATIONS
from megastruct.config.schema import Config, ModelConfig
from megastruct.errors import Problem, UserError
from megastruct.layers.norm import LayerNorm, RMSNorm
from megastruct.layers.vocabulary import VocabParallelEmbedding, VocabParallelHead
from megastruct.models.attention import Attention
from megastruct.models.block import Block
from megastruct.models.documents import document_ids
from megastruct.models.first_weights import draw_first_weights
from megastruct.models.guidance import Guidance
from megastruct.models.mlp import MLP
from megastruct.models.walk import walk
from megastruct.parallel.groups import ALONE, TensorGroup
from megastruct.structures import STRUCTURES
from megastruct.structures.dense.layers import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from megastruct.structures.guide import ColumnGuide, RowGuide

EMBEDDING = "embedding"
HEAD = "head"


class _VocabularyOptions(TypedDict):
    tp: TensorGroup
    init_std: float
    logit_scale: float


class _LinearOptions(TypedDict):
    tp: TensorGroup
    bias: bool
    init_std: float | None


@dataclass(frozen=True)
class NamedLayer:
    """A layer to be built: its global name, and the function that builds it."""

    name: str
    build: Callable[[], nn.Module]


def named_layers(config: Config, tp: TensorGroup, guided: bool = False) -> list[NamedLayer]:
    """The layers embedding, blocks.0 ..., final_norm, and head unless the head is tied to the embedding.

    `guided`: structured linears get guides.
    """
    model = config.model
    d, vocab = model.hidden_size, model.vocab_size
    words: _VocabularyOptions = {"tp": tp, "init_std": model.init_std, "logit_scale": model.logit_scale}
    layers = [NamedLayer(EMBEDDING, partial(VocabParallelEmbedding, vocab, d, **words))]
    layers += [NamedLayer(f"blocks.{i}", partial(_build_block, config, i, tp, guided)) for i in range(model.num_layers)]
    layers += [NamedLayer("final_norm", partial(_build_norm, model, tp))]
    if not model.tie_embeddings:
        layers += [NamedLayer(HEAD, partial(VocabParallelHead, d, vocab, **words))]
    return layers


class GPT(nn.Module):
    """The whole decoder, without a pipeline.

    `guidance` says what the guides do; without it the model has none. `eod_id` is the token that ends a document, if
    attention is to stay inside documents; without it the whole row counts as one document. With `init`, this rank's
    part of the weights that the run's seed gives is drawn, in float32; without it they hold uninitialised memory.
    """

    def __init__(
        self,
        config: Config,
        tp: TensorGroup = ALONE,
        guidance: Guidance | None = None,
        eod_id: int | None = None,
        init: bool = True,
    ) -> None:
        """Raises UserError if `config` is no Config."""
        super().__init__()
        if not isinstance(config, Config):
            found = f"{type(config).__name__} instead of a Config"
            raise UserError(Problem("config", found, "megastruct.load_config(PATH)"))
        layers = named_layers(config, tp, guided=guidance is not None)
        self.guidance, self.eod_id, self.head_dim = guidance, eod_id, config.model.attention_head_dim
        self.layer_names = [layer.name for layer in layers]
        self.blocks = nn.ModuleDict()
        for layer in layers:
            parent, _, name = layer.name.rpartition(".")
            (self.get_submodule(parent) if parent else self).add_module(name, layer.build())
        self.tied = config.model.tie_embeddings
        if init:
            draw_first_weights(self.named_layers(), config.run.seed)

    def named_layers(self) -> list[tuple[str, nn.Module]]:
        """The layers with the names that hold in every layout."""
        return [(name, self.get_submodule(name)) for name in self.layer_names]

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids int64 [b, s] to the logits [s, b, v/tp] of the rank's words."""
        choices = self.guidance.choices() if self.guidance else None
        documents = None if self.eod_id is None else document_ids(ids, self.eod_id)
        x = walk(self.named_layers(), ids, choices, documents, self.head_dim)
        return cast(VocabParallelEmbedding, self.get_submodule(EMBEDDING)).project(x) if self.tied else x


def _build_norm(model: ModelConfig, tp: TensorGroup) -> nn.Module:
    if model.norm == "rmsnorm":
        return RMSNorm(model.hidden_size, model.norm_eps, tp)
    return LayerNorm(model.hidden_size, model.norm_eps, model.bias, tp)


def _build_block(config: Config, index: int, tp: TensorGroup, guided: bool) -> Block:
    model = config.model
    head_norm = partial(RMSNorm, eps=model.norm_eps, tp=tp) if model.qk_norm else nn.Identity
    common: _LinearOptions = {"tp": tp, "bias": model.bias, "init_std": model.linear_init_std}
    attention = Attention(
        model.hidden_size,
        model.num_attention_heads,
        model.kv_heads,
        model.attention_head_dim,
        model.rope_base,
        column=partial(ColumnParallelLinear, gather_input=False, **common),
        row=partial(RowParallelLinear, **common),
        replicated=partial(ReplicatedLinear, **common),
        head_norm=head_norm,
        tp=tp,
    )
    ffn = config.ffn.of_block(index)
    linears = STRUCTURES[ffn.structure].layers
    fc1, fc2 = (partial(linear, **ffn.sizes, **common) for linear in (linears.column, linears.row))
    has_guides = guided and not ffn.is_dense
    guides = [partial(guide, tp=tp, bias=False) for guide in (ColumnGuide, RowGuide)] if has_guides else []
    mlp = MLP(model.hidden_size, model.ffn_hidden_size, ACTIVATIONS[model.activation], fc1, fc2, *guides)
    norms = (_build_norm(model, tp), _build_norm(model, tp))
    return Block(attention, mlp, *norms, recompute=config.training.activation_checkpointing)
