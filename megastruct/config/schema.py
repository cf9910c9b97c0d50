"""The config of a run: one class per section of the YAML file, one line per key.

Values are frozen and checked for type and range here; what concerns several keys at once is in `checks.py`.
Letters in descriptions: d = hidden_size, f = ffn_hidden_size, S = seq_length.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from megastruct.config.activations import ACTIVATIONS
from megastruct.optimizers import ADAMW, OPTIMIZERS
from megastruct.structures import DENSE

Size = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A frozen group of keys; unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(description="folder below `folder`")
    folder: str = "runs"
    seed: Count = 1234


class ModelConfig(Section):
    """The decoder of the paper, section "Models"; the defaults are the paper's."""

    hidden_size: Size
    num_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None = Field(None, description="fewer than num_attention_heads: GQA; left out: equal")
    head_dim: Size | None = Field(None, description="attention width is heads x head_dim; left out: d / heads")
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
        description="structure-aware start and learning rates, level over widths: optimizer.learning_rate is that of a "
        "matrix with this fan-in; left out: the paper's start, and one learning rate for all",
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
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def attention_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def attention_width(self) -> int:
        """a = heads x head_dim, the width inside the attention; equal to d unless `head_dim` says otherwise."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def linear_init_std(self) -> float | None:
        """N(0, init_std^2) as the start of all linears; None: each by its own shape."""
        return self.init_std if self.base_width is None else None

    @property
    def logit_scale(self) -> float:
        return self.base_width / self.hidden_size if self.base_width else 1.0

    @property
    def fc1_out_features(self) -> int:
        """A gated activation's first linear makes gate and value in one map d -> 2f."""
        return self.ffn_hidden_size * ACTIVATIONS[self.activation].fc1_width


class FFNConfig(Section):
    """The structure of both feed-forward linears, and the sizes that it needs: the keys `Numbers.sizes` of the
    structure, such as `rank` and `nblocks`. A size that is null is left out."""

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
        """The sizes that are set, as numbers and layers take them."""
        return dict(self.__pydantic_extra__)

    @property
    def is_dense(self) -> bool:
        return self.structure == DENSE

    def of_block(self, index: int) -> FFNConfig:
        """What holds for one block."""
        return FFNConfig() if index == 0 and self.dense_first_block else self


class GuidedConfig(Section):
    """Self-guided training: a dense guide W beside every structured linear S, o = alpha W x + (1 - alpha) S x, with
    alpha from 1 to 0 over the guided steps. Source: arXiv 2406.16450, section 3."""

    schedule: Literal["off", "fixedstep", "fixedflop"] = Field(
        "off", description="fixedflop: what is read with the guide is read again at the end, without it"
    )
    fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="guided steps over base steps; left out: 0.5 (fixedstep), solved (fixedflop)"
    )
    alpha: Literal["cosine", "linear"] = "cosine"
    skip: Literal["rows", "coin", "none"] = Field(
        "rows", description="W for a share alpha of the tokens, or for all with probability alpha, or for all"
    )
    levels: Size = Field(16, description="rows: the share is a multiple of 1 / levels")

    @field_validator("schedule", mode="before")
    @classmethod
    def _plain_off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a plain `off` as false


class DataSource(Section):
    """One source of a mixture."""

    path: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, Field(gt=0)]


def _path_kind(value: object) -> str:
    return "-list" if isinstance(value, list) else "-path"  # no identifiers: they are left out of messages


class DataConfig(Section):
    kind: Literal["tokens", "text"] = Field(description="token shards of tools/prepare_data.py, or text shards")
    path: Annotated[
        Annotated[str, Tag("-path")] | Annotated[list[DataSource], Field(min_length=1), Tag("-list")],
        Discriminator(_path_kind),
    ] = Field(
        description="folder of token shards; or folder, glob, file or hub name of text shards; or a list of "
        "{path, weight}: samples come from each in proportion to its weight"
    )
    tokenizer: str | None = Field(None, description="SentencePiece model; needed for text, checked for tokens")
    text_column: str = "content"
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.005
    num_streams: Size | None = Field(None, description="text: parallel streams of shards; left out: from the data")
    num_workers: Count = Field(1, description="text: processes per rank that tokenise ahead; 0: a thread of the rank")
    patience_seconds: Annotated[float, Field(ge=0)] = Field(
        300.0, description="text: how long a shard that cannot be reached is tried again"
    )

    @property
    def sources(self) -> list[tuple[str, float]]:
        """(path, weight) of every source; a plain path is one."""
        if isinstance(self.path, str):
            return [(self.path, 1.0)]
        return [(source.path, source.weight) for source in self.path]


class TrainingConfig(Section):
    seq_length: Size
    global_batch_size: Size = Field(description="sequences per optimizer step, over all replicas")
    micro_batch_size: Size = Field(description="sequences per forward, on one replica")
    num_steps: Size | None = Field(None, description="either num_steps or num_tokens")
    num_tokens: Size | None = None
    precision: Literal["fp32", "bf16"] = "bf16"
    document_attention: Literal["crossed", "separate"] = Field(
        "crossed", description="separate: a token sees only earlier ones of its own document in the row"
    )
    activation_checkpointing: bool = False
    compile: bool = Field(False, description="torch.compile every block and the loss")

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_length

    @property
    def base_steps(self) -> int:
        """Steps over new data; a FLOP-matched self-guided run reads some of it again (`planning/steps.py`)."""
        return self.num_steps or max(1, round((self.num_tokens or 0) / self.tokens_per_step))


class OptimizerConfig(Section):
    """What all optimizers have, and the keys of the one that is chosen: its `Optimizer.keys`, such as `beta1`.

    Such a key that is null or left out has its default. Weight decay is on matrices only, not on norms and biases.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Any] = Field(init=False)

    kind: str = ADAMW
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    gradient_clipping: Annotated[float, Field(ge=0)] = Field(1.0, description="global norm; 0 = off")

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        chosen = OPTIMIZERS.get(str(values.get("kind", ADAMW)))
        given = {key: value for key, value in values.items() if value is not None or key in cls.model_fields}
        return (chosen.settings({}) if chosen else {}) | given

    @property
    def settings(self) -> dict[str, Any]:
        """The values of the optimizer's own keys, as its record takes them."""
        return dict(self.__pydantic_extra__)


class ScheduleConfig(Section):
    """Linear warm-up, then a cosine to `min_learning_rate_fraction` of the peak at the last step."""

    warmup_fraction: Fraction = 0.1
    min_learning_rate_fraction: Fraction = 0.1


class ParallelConfig(Section):
    pp: Size = Field(1, description="pipeline stages")
    tp: Size = Field(1, description="ranks that share every block's weights; activations are cut along the sequence")
    dp: Size | None = Field(None, description="replicas; left out: what the processes allow")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1


class EvaluationConfig(Section):
    interval_steps: Count = Field(0, description="0 = only after the last step")
    num_samples: Count = Field(0, description="held-out sequences; 0 = no validation")


class LoggingConfig(Section):
    interval_steps: Size = 10
    progress_bar: bool = True


class CheckpointConfig(Section):
    interval_steps: Count = Field(0, description="0 = only after the last step")
    keep: Size = Field(2, description="complete checkpoints kept")


class ReliabilityConfig(Section):
    """When a run ends by itself: a rank that is gone, stopped or late is named. See docs/reliability.md."""

    silence_seconds: Annotated[float, Field(gt=0)] = Field(60.0, description="a rank without a sign of life is lost")
    collective_seconds: Annotated[float, Field(gt=0)] = Field(
        1800.0, description="the longest that ranks wait for each other: for the slowest save, compilation or disk"
    )
    max_skipped_steps: Count = Field(0, description="steps with a loss or gradient that is not finite; one more ends")
    spike_factor: Annotated[float, Field(ge=0)] = Field(
        0.0, description="a loss above this x the median goes back to the newest checkpoint, skipping data; 0 = off"
    )
    spike_window_steps: Size = Field(50, description="the last steps, of which the median is taken")
    max_spikes: Count = Field(3, description="times that a run goes back; one more ends it")


class HardwareConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(None, description="per device, for MFU")


class Config(Section):
    """A whole run."""

    run: RunConfig
    model: ModelConfig
    ffn: FFNConfig = FFNConfig()
    guided: GuidedConfig = GuidedConfig()
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    hardware: HardwareConfig = HardwareConfig()
    reliability: ReliabilityConfig = ReliabilityConfig()
