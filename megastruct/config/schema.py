"""The config of a run: one class per section of the YAML file, one line per key.

Values are frozen, and their types and ranges are checked here. Checks of several keys at once are in `checks.py`.
`reference.py` makes the page of all keys from the types, defaults and descriptions, and from the unit that a name ends
with or that `json_schema_extra` gives.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from megastruct.config.model import FFNConfig, GuidedConfig, ModelConfig
from megastruct.config.optimizer import OptimizerConfig
from megastruct.config.section import MAX_SECONDS, Count, Fraction, Section, Size, TensorSize
from megastruct.config.system import HardwareConfig, ParallelConfig, ReliabilityConfig


class RunConfig(Section):
    """The name of the run, the folder that holds its folder, and the seed of all randomness."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="name of the run's folder in run.folder: letters, digits, dots, hyphens and underscores. Another "
        "name starts another run"
    )
    folder: str = Field(
        "runs", description="folder that holds the folders of runs. On several machines it must be a shared folder"
    )
    seed: Count = Field(
        1234,
        description="seed of the initial weights, the data order and the random choices of self-guided training. The "
        "same seed gives the same run on any number of processes",
    )


class DataSource(Section):
    """One source of a mixture, with its relative weight."""

    path: Annotated[str, Field(min_length=1)] = Field(description="as data.path, for one source")
    weight: Annotated[float, Field(gt=0)] = Field(
        description="share of the samples, relative to the other sources' weights"
    )


def _path_kind(value: object) -> str:
    return "-list" if isinstance(value, list) else "-path"  # not identifiers, so messages leave them out


class DataConfig(Section):
    """The training data and its tokenizer."""

    kind: Literal["tokens", "text"] = Field(
        description="tokens: shards of token ids, made by tools/prepare_data.py, for full speed from the first step. "
        "text: shards of documents, tokenised during training"
    )
    path: Annotated[
        Annotated[str, Tag("-path")] | Annotated[list[DataSource], Field(min_length=1), Tag("-list")],
        Discriminator(_path_kind),
    ] = Field(
        description="tokens: a folder of shards. text: a folder, pattern, file or dataset name on the hub. A mixture "
        "is a list of {path, weight}: samples are drawn from each source in proportion to its weight"
    )
    tokenizer: str | None = Field(
        None,
        description="SentencePiece model. Required with data.kind=text; token shards contain a copy, which a given "
        "model must equal",
    )
    text_column: str = Field("content", description="with data.kind=text: column that holds the documents")
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.005,
        description="with data.kind=text: share of the documents that is held out for validation; token shards have "
        "theirs fixed. Large corpora need less, small ones such as a tutorial's more (0.02)",
    )
    num_streams: Size | None = Field(
        None,
        description="with data.kind=text: streams of shards that are read in turn. Left out: follows from the number "
        "of shards",
    )
    num_workers: Count = Field(
        1,
        description="with data.kind=text: processes per rank that tokenise ahead. 0: a thread of the rank. Take more "
        "if data_wait_seconds in the metrics is not near 0",
    )
    patience_seconds: Annotated[float, Field(ge=0, le=MAX_SECONDS)] = Field(
        300.0, description="with data.kind=text: how long reading a shard that cannot be reached is retried"
    )

    @property
    def sources(self) -> list[tuple[str, float]]:
        """(path, weight) of every source; a plain path is a single source."""
        if isinstance(self.path, str):
            return [(self.path, 1.0)]
        return [(source.path, source.weight) for source in self.path]


class TrainingConfig(Section):
    """Batch sizes, length and precision of the training."""

    seq_length: TensorSize = Field(
        description="tokens per sequence; the longest context that the model sees", json_schema_extra={"unit": "tokens"}
    )
    global_batch_size: TensorSize = Field(
        description="sequences per optimizer step, summed over all replicas; a multiple of micro_batch_size x replicas",
        json_schema_extra={"unit": "sequences"},
    )
    micro_batch_size: TensorSize = Field(
        description="sequences per forward on one replica. The largest that fits into memory is usually fastest; with "
        "pipeline stages, leave at least as many micro-batches per step as there are stages",
        json_schema_extra={"unit": "sequences"},
    )
    num_steps: Size | None = Field(
        None, description="length of the run in optimizer steps; set either num_steps or num_tokens"
    )
    num_tokens: Size | None = Field(
        None, description="length of the run in tokens, rounded to whole steps; set either num_steps or num_tokens"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "bf16",
        description="arithmetic of forward and backward. bf16 on GPUs (masters and optimizer stay fp32); fp32 on CPUs "
        "and for comparisons",
    )
    document_attention: Literal["crossed", "separate"] = Field(
        "crossed",
        description="crossed: a token attends to all earlier tokens of its packed row, as in the paper. separate: "
        "only to those of its own document, for corpora of short documents",
    )
    activation_checkpointing: bool = Field(
        False,
        description="keep only the inputs of blocks and compute the rest again in the backward. true saves memory and "
        "costs about a third more compute",
    )
    compile: bool = Field(
        False,
        description="compile every block and the loss with torch.compile. true is faster on GPUs, after a slower "
        "first step",
    )

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, over all replicas."""
        return self.global_batch_size * self.seq_length

    @property
    def base_steps(self) -> int:
        """Steps over new data; a FLOP-matched self-guided run then reads some data again (`planning/steps.py`)."""
        return self.num_steps or max(1, round((self.num_tokens or 0) / self.tokens_per_step))


class ScheduleConfig(Section):
    """Linear warm-up, then a cosine to `min_learning_rate_fraction` of the peak at the last step."""

    warmup_fraction: Fraction = Field(
        0.1, description="share of the run's steps in which the learning rate rises from 0 to its peak"
    )
    min_learning_rate_fraction: Fraction = Field(
        0.1, description="learning rate at the last step, as a share of the peak"
    )


class EvaluationConfig(Section):
    """When and on how much held-out data the loss is computed."""

    interval_steps: Count = Field(0, description="steps between two validations. 0: only after the last step")
    num_samples: Count = Field(0, description="held-out sequences per validation. 0: no validation")


class LoggingConfig(Section):
    """How often metrics are written, and whether a progress bar is shown."""

    interval_steps: Size = Field(10, description="steps between two records of metrics")
    progress_bar: bool = Field(True, description="whether a progress bar is shown")


class CheckpointConfig(Section):
    """How often checkpoints are saved, and how many are kept."""

    interval_steps: Count = Field(
        0,
        description="steps between two checkpoints. 0: only after the last step. Choose what you can afford to lose "
        "in a crash",
    )
    keep: Size = Field(2, description="complete checkpoints that are kept; older ones are deleted")


class Config(Section):
    """The config of a whole run."""

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
