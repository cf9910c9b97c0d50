"""The sections `model`, `ffn` and `guided` of a config: what the model is, and how its structures are guided.

Letters in descriptions: d = hidden_size, f = ffn_hidden_size.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from megastruct.config.activations import ACTIVATIONS
from megastruct.config.section import Section, TensorSize
from megastruct.structures import DENSE, STRUCTURES

MAX_LAYERS = 2**16


class ModelConfig(Section):
    """The decoder. The defaults are those of arXiv 2406.16450, section "Models"."""

    hidden_size: TensorSize = Field(
        description="width d of the residual stream, the input and output of every block",
        json_schema_extra={"unit": "features"},
    )
    num_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)] = Field(
        description="blocks, each with an attention and a feed-forward network"
    )
    num_attention_heads: TensorSize = Field(
        description="query heads; must divide hidden_size unless head_dim is set. Widths of 64 to 128 features per "
        "head are usual"
    )
    num_key_value_heads: TensorSize | None = Field(
        None,
        description="key and value heads; must divide num_attention_heads. Left out: as many as query heads. Fewer "
        "(grouped-query attention) make the key/value cache smaller and generation faster",
    )
    head_dim: TensorSize | None = Field(
        None,
        description="width of a head, an even number; the attention is heads x head_dim wide. Left out: hidden_size / "
        "num_attention_heads. Set it for an attention that is narrower or wider than the model",
        json_schema_extra={"unit": "features"},
    )
    ffn_hidden_size: TensorSize = Field(
        description="inner width f of the feed-forward networks: usually 4 x hidden_size with gelu, 8/3 x hidden_size "
        "with swiglu",
        json_schema_extra={"unit": "features"},
    )
    vocab_size: TensorSize = Field(
        32_000,
        description="rows of the embedding: at least the tokenizer's vocabulary. More rows are padding, for example "
        "up to a multiple of 128, which is faster on GPUs",
        json_schema_extra={"unit": "tokens"},
    )
    activation: str = Field(
        "gelu",
        description="function between the two feed-forward linears. gelu as in the paper; swiglu is gated and has a "
        "third weight matrix",
        json_schema_extra=lambda schema: schema.update(enum=[*ACTIVATIONS]),
    )
    norm: Literal["layernorm", "rmsnorm"] = Field(
        "layernorm",
        description="normalisation before attention and feed-forward network: layernorm as in the paper, rmsnorm as "
        "in Llama",
    )
    norm_eps: Annotated[float, Field(gt=0)] = Field(
        1e-5, description="number added to the variance (layernorm) or mean square (rmsnorm, qk_norm) before the root"
    )
    qk_norm: bool = Field(
        False,
        description="whether the query and the key of every head are normalised (rmsnorm) before the rotary "
        "embedding, each with one learned weight for all heads, as in Qwen3. true keeps attention scores from "
        "growing, which makes large learning rates more stable",
    )
    bias: bool = Field(
        True, description="whether linears and layernorms have bias vectors. true as in the paper, false as in Llama"
    )
    tie_embeddings: bool = Field(
        True,
        description="whether the output head uses the weights of the embedding. true saves vocab_size x hidden_size "
        "parameters, which matters for small models",
    )
    rope_base: Annotated[float, Field(gt=0)] = Field(
        10_000.0,
        description="base of the rotary position embedding. 10000 is usual for sequences of up to about 4096 tokens, "
        "larger values for longer ones",
    )
    init_std: Annotated[float, Field(gt=0)] = Field(
        0.02,
        description="standard deviation of the initial weights: of embedding and output head, and of the linears "
        "unless base_width is set",
    )
    base_width: TensorSize | None = Field(
        None,
        description="fan-in of the matrices to which optimizer.learning_rate applies; initial values and learning "
        "rates of the others are scaled by their fan-in. Set it to use a learning rate found on a "
        "narrower model. Left out: the paper's initialisation and one learning rate",
        json_schema_extra={"unit": "features"},
    )

    @field_validator("activation")
    @classmethod
    def _known_activation(cls, name: str) -> str:
        if name not in ACTIVATIONS:
            meant = difflib.get_close_matches(name, ACTIVATIONS, n=1, cutoff=0.0)
            known = ", ".join(map(repr, ACTIVATIONS))
            raise PydanticCustomError("unknown_name", "must be one of {known}", {"known": known, "meant": meant[0]})
        return name

    @property
    def kv_heads(self) -> int:
        """The number of key/value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def attention_head_dim(self) -> int:
        """The features of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def attention_width(self) -> int:
        """The width inside the attention, a = heads x head_dim; equal to d unless `head_dim` is set."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def linear_init_std(self) -> float | None:
        """Standard deviation of the initial weights of all linears; None: it depends on the shape of each linear."""
        return self.init_std if self.base_width is None else None

    @property
    def logit_scale(self) -> float:
        """The factor of the logits, which keeps their size independent of the width; 1 without `base_width`."""
        return self.base_width / self.hidden_size if self.base_width else 1.0

    @property
    def fc1_out_features(self) -> int:
        """Outputs of the first FFN linear; a gated activation's computes gate and value in one map d -> 2f."""
        return self.ffn_hidden_size * ACTIVATIONS[self.activation].fc1_width


class FFNConfig(Section):
    """The structure of both feed-forward linears, and its sizes.

    The sizes are the keys in the structure's `Numbers.sizes`, such as `rank` and `nblocks`; a null one counts as left
    out.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, TensorSize] = Field(init=False)

    structure: str = Field(
        DENSE,
        description="structure of the weight matrices. Start with lowrank; take blockdense where the rank is the "
        "limit, blockshuffle where full rank is wanted",
        json_schema_extra=lambda schema: schema.update(enum=[*STRUCTURES]),
    )
    dense_first_block: bool = Field(
        True,
        description="whether the first block keeps a dense feed-forward network, as in the paper",
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None or key in cls.model_fields}

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that are set, by key."""
        return dict(self.__pydantic_extra__)

    @property
    def is_dense(self) -> bool:
        """Whether both linears are dense."""
        return self.structure == DENSE

    def of_block(self, index: int) -> FFNConfig:
        """The FFN config of block `index`, dense for the first block if `dense_first_block` is set."""
        return FFNConfig() if index == 0 and self.dense_first_block else self


class GuidedConfig(Section):
    """Self-guided training: a dense guide W beside every structured linear S, o = alpha W x + (1 - alpha) S x.

    alpha falls from 1 to 0 over the guided steps. Source: arXiv 2406.16450, section 3.
    """

    schedule: Literal["off", "fixedstep", "fixedflop"] = Field(
        "off",
        description="off: no guide. fixedstep: guided steps first, as many steps as without a guide. fixedflop: the "
        "training FLOPs of the dense model; the data of the guided steps is read again at the end, "
        "without the guide",
    )
    fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="guided steps / base steps. Left out: 0.5 with fixedstep, computed to match the FLOPs with "
        "fixedflop",
    )
    alpha: Literal["cosine", "linear"] = Field(
        "cosine",
        description="curve by which the guide's weight falls from 1 to 0 over the guided steps; cosine as in the paper",
    )
    skip: Literal["rows", "coin", "none"] = Field(
        "rows",
        description="how the cost of the guide is halved. rows: it sees a share alpha of the tokens. coin: all tokens "
        "with probability alpha, as in the paper, which is noisier. none: all tokens in every forward, at "
        "the whole cost",
    )
    levels: TensorSize = Field(
        16,
        description="with guided.skip=rows: the share of tokens is rounded to a multiple of 1 / levels. A compiled "
        "block is compiled once per level",
    )
