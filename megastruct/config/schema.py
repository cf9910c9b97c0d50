"""The config of a run: one class per section of the YAML file, one line per key.

Values are frozen, and their types and ranges are checked here. Checks of several keys at once are in `checks.py`.
Letters in descriptions: d = hidden_size, f = ffn_hidden_size, S = seq_length.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from megastruct.config.model import FFNConfig, ModelConfig
from megastruct.config.section import Count, Fraction, Section, Size
from megastruct.optimizers import ADAMW, OPTIMIZERS


class RunConfig(Section):
    """The name of the run, the folder that holds its folder, and the seed of all randomness."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="name of the run's folder, below `folder`"
    )
    folder: str = "runs"
    seed: Count = 1234


class GuidedConfig(Section):
    """Self-guided training: a dense guide W beside every structured linear S, o = alpha W x + (1 - alpha) S x.

    alpha falls from 1 to 0 over the guided steps. Source: arXiv 2406.16450, section 3.
    """

    schedule: Literal["off", "fixedstep", "fixedflop"] = Field(
        "off", description="fixedflop: the data of the guided steps is read again at the end, without the guide"
    )
    fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="guided steps / base steps; left out: 0.5 (fixedstep), computed to match FLOPs (fixedflop)"
    )
    alpha: Literal["cosine", "linear"] = "cosine"
    skip: Literal["rows", "coin", "none"] = Field(
        "rows",
        description="rows: W sees a share alpha of the tokens; coin: all with probability alpha; none: all always",
    )
    levels: Size = Field(16, description="rows: the share is rounded to a multiple of 1 / levels")

    @field_validator("schedule", mode="before")
    @classmethod
    def _plain_off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a plain `off` as false


class DataSource(Section):
    """One source of a mixture, with its relative weight."""

    path: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, Field(gt=0)]


def _path_kind(value: object) -> str:
    return "-list" if isinstance(value, list) else "-path"  # not identifiers, so messages leave them out


class DataConfig(Section):
    """The training data and its tokenizer."""

    kind: Literal["tokens", "text"] = Field(
        description="tokens: shards of token ids from megastruct-prepare, or files of Megatron-LM; text: shards of "
        "documents"
    )
    path: Annotated[
        Annotated[str, Tag("-path")] | Annotated[list[DataSource], Field(min_length=1), Tag("-list")],
        Discriminator(_path_kind),
    ] = Field(
        description="tokens: folder of shards; text: folder, glob, file or dataset name on the hub; or a list of "
        "{path, weight}: samples are drawn from each in proportion to its weight"
    )
    tokenizer: str | None = Field(
        None,
        description="SentencePiece model, tokenizer.json, or a folder that has one; required for text and for files of "
        "Megatron, compared with the data for token shards",
    )
    eod_token: str | None = Field(
        None, description="special token that ends a document; left out: what the tokenizer's files say"
    )
    bos_token: str | None = Field(
        None,
        description="special token before every document; an empty string: none; left out: what the tokenizer's files "
        "say, and none for SentencePiece",
    )
    special_tokens_in_text: bool = Field(
        False,
        description="whether text that reads as a special token becomes that token; never the one that ends a document",
    )
    text_column: str = "content"
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.005
    num_streams: Size | None = Field(
        None, description="text: streams of shards that are read in parallel; left out: follows from the data"
    )
    num_workers: Count = Field(1, description="text: processes per rank that tokenise ahead; 0: a thread instead")
    patience_seconds: Annotated[float, Field(ge=0)] = Field(
        300.0, description="text: how long reading a shard that cannot be reached is retried"
    )

    @property
    def sources(self) -> list[tuple[str, float]]:
        """(path, weight) of every source; a plain path is a single source."""
        if isinstance(self.path, str):
            return [(self.path, 1.0)]
        return [(source.path, source.weight) for source in self.path]


class TrainingConfig(Section):
    """Batch sizes, length and precision of the training."""

    seq_length: Size
    global_batch_size: Size = Field(description="sequences per optimizer step, summed over all replicas")
    micro_batch_size: Size = Field(description="sequences per forward on one replica")
    num_steps: Size | None = Field(None, description="length of the run; set either num_steps or num_tokens")
    num_tokens: Size | None = None
    precision: Literal["fp32", "bf16"] = "bf16"
    document_attention: Literal["crossed", "separate"] = Field(
        "crossed", description="separate: a token attends only to earlier tokens of its own document"
    )
    activation_checkpointing: bool = False
    compile: bool = Field(False, description="torch.compile every block and the loss")

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, over all replicas."""
        return self.global_batch_size * self.seq_length

    @property
    def base_steps(self) -> int:
        """Steps over new data; a FLOP-matched self-guided run then reads some data again (`planning/steps.py`)."""
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
    """How the ranks are divided into pipeline stages, tensor-parallel groups and replicas, and the ZeRO stage."""

    pp: Size = Field(1, description="pipeline stages")
    tp: Size = Field(1, description="ranks that share every block's weights and split activations along the sequence")
    dp: Size | None = Field(None, description="replicas; left out: as many as the processes allow")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1


class EvaluationConfig(Section):
    """When and on how much held-out data the loss is computed."""

    interval_steps: Count = Field(0, description="0 = only after the last step")
    num_samples: Count = Field(0, description="held-out sequences; 0 = no validation")


class LoggingConfig(Section):
    """How often metrics are written, and whether a progress bar is shown."""

    interval_steps: Size = 10
    progress_bar: bool = True


class CheckpointConfig(Section):
    """How often checkpoints are saved, and how many are kept."""

    interval_steps: Count = Field(0, description="0 = only after the last step")
    keep: Size = Field(2, description="number of complete checkpoints to keep")


class ReliabilityConfig(Section):
    """Limits after which a run ends itself and names the cause.

    Causes are a dead, stopped or hanging rank, skipped steps and loss spikes; see docs/reliability.md.
    """

    silence_seconds: Annotated[float, Field(gt=0)] = Field(
        60.0, description="a rank that sends no heartbeat for this long ends the run"
    )
    collective_seconds: Annotated[float, Field(gt=0)] = Field(
        1800.0, description="longest time that ranks wait for each other, such as for a slow save, compilation or disk"
    )
    max_skipped_steps: Count = Field(
        0, description="steps with a loss or gradient that is not finite; one more ends the run"
    )
    spike_factor: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="after a loss above this x the recent median, the run goes back to the newest checkpoint and skips "
        "data; 0 = off",
    )
    spike_window_steps: Size = Field(50, description="number of recent losses in the median")
    max_spikes: Count = Field(3, description="how often a run goes back; one more spike ends it")


class HardwareConfig(Section):
    """The device, and its peak for model FLOPs utilisation (MFU)."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(
        None, description="peak of one device in TFLOP/s, for MFU; left out: from a table of GPUs"
    )


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
