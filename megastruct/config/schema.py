"""The config of a run: one class per section of the YAML file, one line per key.

Values are frozen, and their types and ranges are checked here. Checks of several keys at once are in `checks.py`.
`reference.py` makes the page of all keys from the types, defaults and descriptions, and from the unit that a name ends
with or that `json_schema_extra` gives.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from megastruct.config.batch_sizes import BatchRamp, BatchSizes, BatchStage, batch_sizes
from megastruct.config.data import DataConfig
from megastruct.config.model import FFNConfig, GuidedConfig, ModelConfig
from megastruct.config.optimizer import OptimizerConfig
from megastruct.config.section import MAX_SECONDS, Count, Fraction, PathText, Section, Size, TensorSize
from megastruct.config.system import HardwareConfig, ParallelConfig, ProfilingConfig, ReliabilityConfig

Recompute = Literal[False, True, "selective"]  # what is computed again in the backward: all, nothing, or what is cheap


class RunConfig(Section):
    """Name and place of the run, the seed of all randomness, and the run that it branches from."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="name of the run's folder in run.folder: letters, digits, dots, hyphens and underscores. Another "
        "name starts another run"
    )
    folder: PathText = Field(
        "runs", description="folder that holds the folders of runs. On several machines it must be a shared folder"
    )
    seed: Count = Field(
        1234,
        description="seed of the initial weights, the data order and the random choices of self-guided training. The "
        "same seed gives the same run on any number of processes",
    )
    from_: Annotated[PathText, Field(min_length=1)] | None = Field(
        None,
        alias="from",
        description="branch from the checkpoint FOLDER@STEP of another run. Without @STEP: from its newest checkpoint",
    )
    inherit: Literal["weights", "data", "optimizer", "all"] = Field(
        "weights",
        description="what a branch takes over. weights: only them, for other data. data: with the place in the data. "
        "optimizer: with the optimizer's state. all: with both, to go on as the parent would. With weights and data "
        "the optimizer's state starts anew, so that it may be another optimizer",
    )

    @property
    def inherits_optimizer(self) -> bool:
        """Whether a branch goes on with its parent's optimizer state."""
        return self.inherit in ("optimizer", "all")

    @property
    def inherits_place(self) -> bool:
        """Whether a branch goes on at its parent's place in the data."""
        return self.inherit in ("data", "all")

    @field_validator("folder")
    @classmethod
    def _is_no_address(cls, value: str) -> str:
        if "://" in value:
            raise ValueError("an address cannot be a run folder; give a folder, and the address as checkpoint.mirror")
        return value


def _warmup_kind(value: object) -> str:
    return "-ramp" if isinstance(value, dict | BatchRamp) else "-stages"


class TrainingConfig(Section):
    """Batch sizes, length and precision of the training."""

    seq_length: TensorSize = Field(
        description="tokens per sequence; the longest context that the model sees", json_schema_extra={"unit": "tokens"}
    )
    global_batch_size: TensorSize = Field(
        description="sequences per optimizer step, summed over all replicas; a multiple of micro_batch_size x replicas",
        json_schema_extra={"unit": "sequences"},
    )
    batch_size_warmup: (
        Annotated[
            Annotated[BatchRamp, Tag("-ramp")] | Annotated[tuple[BatchStage, ...], Field(strict=False), Tag("-stages")],
            Discriminator(_warmup_kind),
        ]
        | None
    ) = Field(
        None,
        description="smaller global batches at first: a list of stages {batch_size, num_steps or num_tokens}, or a "
        "ramp {start, increment, num_steps or num_tokens}. Left out: global_batch_size from the first step on",
        examples=["{start: 64, increment: 64, num_steps: 1000}"],
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
    z_loss: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="coefficient of the mean squared log-sum-exp of the logits, which is added to the cross-entropy "
        "that is minimised and keeps logits from drifting; 1e-4 is usual. Reported losses stay cross-entropy alone. "
        "0: off",
    )
    document_attention: Literal["crossed", "separate"] = Field(
        "crossed",
        description="crossed: a token attends to all earlier tokens of its packed row, as in the paper. separate: "
        "only to those of its own document, for corpora of short documents",
    )
    activation_checkpointing: Recompute = Field(
        False,
        description="what is computed again in the backward instead of being kept. true: everything but the inputs of "
        "blocks, which saves most memory and costs about a third more compute. selective: norms, rotary embeddings, "
        "activations and sums, but no products, attention or communication; not with ZeRO 3",
    )
    compile: bool = Field(
        False,
        description="compile every block and the loss with torch.compile. true is faster on GPUs, after a slower "
        "first step",
    )

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step over all replicas, after the warm-up of the batch size."""
        return self.global_batch_size * self.seq_length

    @property
    def batch_sizes(self) -> BatchSizes:
        """The global batch size of every step."""
        return batch_sizes(self.global_batch_size, self.seq_length, self.batch_size_warmup)

    def tokens(self, num_steps: int) -> int:
        """Tokens of the first `num_steps` steps, over all replicas; tokens that are read again count again."""
        return self.batch_sizes.samples(num_steps) * self.seq_length

    @property
    def base_steps(self) -> int:
        """Steps over new data; a FLOP-matched self-guided run then reads some data again (`planning/steps.py`)."""
        return self.num_steps or self.batch_sizes.steps_of(self.num_tokens or 0, self.seq_length)


class ScheduleConfig(Section):
    """The learning rate over the run: a linear warm-up to its peak, then one of config/schedules.py."""

    kind: str = Field(
        "cosine",
        description="cosine, linear, constant, wsd (warm-up, stable, decay) or inverse_sqrt. cosine and linear fit a "
        "run of known length; from the stable part of wsd, decays of several lengths can be branched off",
    )
    num_steps: Size | None = Field(
        None, description="length of the schedule, whose last value then holds. Left out: the length of the run"
    )
    unit: Literal["steps", "tokens"] = Field(
        "steps", description="what progress is measured in; they differ while the batch size is warmed up"
    )
    warmup_fraction: Fraction = Field(
        0.1, description="share of the schedule's length in which the learning rate rises from 0 to its peak"
    )
    warmup_steps: Count | None = Field(None, description="length of the warm-up, instead of warmup_fraction")
    min_learning_rate_fraction: Fraction = Field(
        0.1, description="the lowest learning rate after the warm-up, as a share of the peak"
    )
    decay: Literal["linear", "cosine", "1-sqrt"] | None = Field(
        None, description="with schedule.kind=wsd: the shape of the decay. Left out: linear"
    )
    decay_fraction: Fraction | None = Field(
        None, description="with schedule.kind=wsd: length of the decay as a share of the schedule's. Left out: 0.2"
    )
    decay_steps: Count | None = Field(
        None, description="with schedule.kind=wsd: length of the decay, instead of decay_fraction"
    )


class EvaluationConfig(Section):
    """When and on how much held-out data the loss is computed."""

    interval_steps: Count = Field(0, description="steps between two validations. 0: only after the last step")
    num_samples: Count = Field(0, description="held-out sequences per validation. 0: no validation")
    sources: dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], Annotated[PathText, Field(min_length=1)]] = Field(
        {},
        description="further data to validate on, {NAME: PATH, ...}: token shards (their held-out part, if they have "
        "one) or text. num_samples sequences of each give validation_loss/NAME",
        examples=["{books: data/books}"],
    )


class LoggingConfig(Section):
    """How often metrics are written, where they go, and what a terminal or a log shows."""

    interval_steps: Size = Field(10, description="steps between two records of metrics")
    progress_bar: bool = Field(True, description="false: with style auto, neither a bar nor lines")
    style: Literal["auto", "bar", "lines"] = Field(
        "auto", description="lines: one line per record, for logs. auto: a bar on a terminal, lines elsewhere"
    )
    wandb_project: str | None = Field(
        None, description="project of Weights & Biases that also gets the metrics (extra wandb). Left out: none"
    )
    wandb_entity: str | None = Field(None, description="user or team of that project. Left out: your default")


class CheckpointConfig(Section):
    """How often checkpoints are saved, how many are kept, and where they are copied."""

    interval_steps: Count = Field(
        0,
        description="steps between two checkpoints. 0: only after the last step. Choose what you can afford to lose "
        "in a crash",
    )
    keep: Size = Field(2, description="complete checkpoints that are kept; older ones are deleted")
    keep_every: Count = Field(
        0,
        description="keep the checkpoints of every so many steps for ever, beside the newest ones; runs can be "
        "branched off them. 0: off",
    )
    mirror: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://.")] | None = Field(
        None,
        description="address, such as s3://BUCKET/runs: every checkpoint is copied to its folder run.name, and a run "
        "whose own folder has no newer one resumes from there",
    )
    mirror_wait_seconds: Annotated[float, Field(ge=0, le=MAX_SECONDS)] = Field(
        1800.0, description="how long the end of a run waits for the copy of its last checkpoint"
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
    profiling: ProfilingConfig = ProfilingConfig()
