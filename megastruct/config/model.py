"""The sections `model` and `ffn` of a config: what the model is.

Letters in descriptions: d = hidden_size, f = ffn_hidden_size.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from megastruct.config.activations import ACTIVATIONS
from megastruct.config.section import Section, Size
from megastruct.structures import DENSE

_LARGEST_WIDTH = 2**22
_LARGEST = {"num_layers": 2_000, "vocab_size": 2**31}


class ModelConfig(Section):
    """The decoder of the paper, section "Models"; the defaults are the paper's."""

    hidden_size: Size
    num_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None = Field(
        None, description="fewer than num_attention_heads gives GQA; left out: equal"
    )
    head_dim: Size | None = Field(None, description="the attention width is heads x head_dim; left out: d / heads")
    ffn_hidden_size: Size
    vocab_size: Size = 32_000
    activation: str = Field("gelu", description="one of config/activations.py")
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    bias: bool = True
    tie_embeddings: bool = True
    rope_base: Annotated[float, Field(gt=0)] = 10_000.0
    init_std: Annotated[float, Field(gt=0)] = 0.02
    base_width: Size | None = Field(
        None,
        description="scales initial values and learning rates by each matrix's fan-in; optimizer.learning_rate applies "
        "to a matrix with this fan-in; left out: the paper's initialisation and one learning rate",
    )

    @field_validator("hidden_size", "ffn_hidden_size", "num_layers", "vocab_size")
    @classmethod
    def _of_a_machine(cls, value: int, info: ValidationInfo) -> int:
        """A bound for what is computed from these sizes before it is known whether the model fits into memory."""
        most = _LARGEST.get(str(info.field_name), _LARGEST_WIDTH)
        if value > most:
            raise PydanticCustomError("size", "no machine holds this; at most {most}", {"most": most})
        return value

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
    __pydantic_extra__: dict[str, Size] = Field(init=False)

    structure: str = DENSE
    dense_first_block: bool = Field(True, description="the first block keeps its dense FFN, as in the paper")

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
