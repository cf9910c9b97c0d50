"""The config of a run: one class per section of the YAML file, one line per key.

Values are frozen, and their types and ranges are checked here. Checks of several keys at once are in `checks.py`.
Letters in descriptions: d = hidden_size, f = ffn_hidden_size, S = seq_length.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from megastruct.config.batch_sizes import BatchRamp, BatchSizes, BatchStage, batch_sizes
from megastruct.config.model import FFNConfig, ModelConfig
from megastruct.config.section import Count, Fraction, PathText, Section, Size
from megastruct.optimizers import ADAMW, OPTIMIZERS


class RunConfig(Section):
    """Name and place of the run, the seed of all randomness, and the run that it branches from."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="name of the run's folder, below `folder`"
    )
    folder: PathText = "runs"
    seed: Count = 1234
    from_: Annotated[PathText, Field(min_length=1)] | None = Field(
        None,
        alias="from",
        description="branch from the checkpoint FOLDER@STEP of another run; without @STEP from its newest checkpoint",
    )
    inherit: Literal["weights", "optimizer", "all"] = Field(
        "weights",
        description="what a branch takes over: weights; optimizer: with the optimizer's state; all: with the place in "
        "the data as well",
    )

    @field_validator("folder")
    @classmethod
    def _is_no_address(cls, value: str) -> str:
        if "://" in value:
            raise ValueError("an address cannot be a run folder; give a folder, and the address as checkpoint.mirror")
        return value


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


def _path_kind(value: object) -> str:
    # Not identifiers, so messages leave them out.
    if not isinstance(value, list):
        return "-path"
    return "-paths" if value and all(isinstance(item, str) for item in value) else "-list"


Path = Annotated[PathText, Field(min_length=1)]
Paths = Annotated[list[Path], Field(min_length=1)]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class TextChoice(Section):
    """Which part of a place of text is meant."""

    config: str | None = Field(None, description="text: configuration of a dataset, such as `en`")
    split: str | None = Field(None, description="text: split of a dataset, such as `train`; `all`: every file")
    validation_split: str | None = Field(
        None, description="text: split that is held out, in place of a share of the documents"
    )
    include: Annotated[list[Path] | None, BeforeValidator(_as_list)] = Field(
        None, description="text: pattern or patterns of file names; left out: all files"
    )


class DataSource(TextChoice):
    """One source of a mixture, with its relative weight; its choices take the place of those of `data`."""

    path: Annotated[Annotated[Path, Tag("-path")] | Annotated[Paths, Tag("-paths")], Discriminator(_path_kind)]
    weight: Annotated[float, Field(gt=0)]

    @property
    def paths(self) -> list[str]:
        """The places of the source."""
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def label(self) -> str:
        """The first path with the configuration and the split, which tell sources of one dataset apart."""
        return "/".join(filter(None, (self.paths[0], self.config, self.split)))


def _warmup_kind(value: object) -> str:
    return "-ramp" if isinstance(value, dict | BatchRamp) else "-stages"


class DataConfig(TextChoice):
    """The training data and its tokenizer."""

    kind: Literal["tokens", "text"] = Field(
        description="tokens: shards of token ids from megastruct-prepare; text: shards of documents"
    )
    path: Annotated[
        Annotated[PathText, Tag("-path")]
        | Annotated[Paths, Tag("-paths")]
        | Annotated[list[DataSource], Field(min_length=1), Tag("-list")],
        Discriminator(_path_kind),
    ] = Field(
        description="tokens: folder of shards; text: folder, glob, file or dataset name on the hub, or a list of them; "
        "for both, an address such as s3://BUCKET/FOLDER; or a list of {path, weight}: samples are drawn from each in "
        "proportion to its weight"
    )
    tokenizer: PathText | None = Field(
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
    text_column: str | None = Field(
        None, description="text: the column that holds the text; left out: `content`, or else `text`"
    )
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.005
    num_streams: Size | None = Field(
        None, description="text: streams of shards that are read in parallel; left out: follows from the data"
    )
    num_workers: Count = Field(1, description="text: processes per rank that tokenise ahead; 0: a thread instead")
    patience_seconds: Annotated[float, Field(ge=0)] = Field(
        300.0, description="how long reading a shard of text, or the mirror of a run, that fails is retried"
    )
    token_cache: PathText | None = Field(
        None,
        description="tokens at an address (s3://...): folder for the copy that is made before training; left out: "
        "~/.cache/megastruct/tokens",
    )

    @property
    def places(self) -> list[DataSource]:
        """Every source with its choices; a plain path, or a list of them, is a single source."""
        own = {key: getattr(self, key) for key in TextChoice.model_fields}
        sources = [source for source in self.path if isinstance(source, DataSource)]
        if not sources:
            paths: Any = self.path
            return [DataSource(path=paths, weight=1.0, **own)]
        return [source.model_copy(update={k: own[k] for k in own if not getattr(source, k)}) for source in sources]

    @property
    def sources(self) -> list[tuple[str, float]]:
        """(path, weight) of every source; of several paths the first.

        Where two sources have the same path, the path is followed by what tells them apart.
        """
        firsts = [source.paths[0] for source in self.places]
        return [
            (source.label if firsts.count(source.paths[0]) > 1 else source.paths[0], source.weight)
            for source in self.places
        ]


class TrainingConfig(Section):
    """Batch sizes, length and precision of the training."""

    seq_length: Size
    global_batch_size: Size = Field(description="sequences per optimizer step, summed over all replicas")
    batch_size_warmup: (
        Annotated[
            Annotated[BatchRamp, Tag("-ramp")] | Annotated[tuple[BatchStage, ...], Field(strict=False), Tag("-stages")],
            Discriminator(_warmup_kind),
        ]
        | None
    ) = Field(
        None,
        description="smaller global batches at first: a list of stages {batch_size, num_steps or num_tokens}, or a "
        "ramp {start, increment, num_steps or num_tokens}; left out: global_batch_size from the first step on",
        examples=["{start: 64, increment: 64, num_steps: 1000}"],
    )
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
    """The learning rate over the run: a linear warm-up to its peak, then one of config/schedules.py."""

    kind: str = Field(
        "cosine",
        description="cosine, linear, constant, wsd (warm-up, stable, decay) or inverse_sqrt",
    )
    num_steps: Size | None = Field(
        None, description="length of the schedule, whose last value then holds; left out: the length of the run"
    )
    unit: Literal["steps", "tokens"] = Field(
        "steps", description="what progress is measured in; they differ while the batch size is warmed up"
    )
    warmup_fraction: Fraction = Field(0.1, description="length of the warm-up as a share of the schedule's length")
    warmup_steps: Count | None = Field(None, description="length of the warm-up, instead of warmup_fraction")
    min_learning_rate_fraction: Fraction = Field(
        0.1, description="the lowest learning rate after the warm-up, as a share of the peak"
    )
    decay: Literal["linear", "cosine", "1-sqrt"] | None = Field(
        None, description="wsd: the shape of the decay; left out: linear"
    )
    decay_fraction: Fraction | None = Field(
        None, description="wsd: length of the decay as a share of the schedule's length; left out: 0.2"
    )
    decay_steps: Count | None = Field(None, description="wsd: length of the decay, instead of decay_fraction")


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
    sources: dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], Annotated[str, Field(min_length=1)]] = Field(
        {},
        description="further data to validate on, {NAME: PATH, ...}: token shards (their held-out part, if they have "
        "one) or text; num_samples sequences of each give validation_loss/NAME",
        examples=["{books: data/books}"],
    )


class LoggingConfig(Section):
    """How often metrics are written, where they go, and what a terminal or a log shows."""

    interval_steps: Size = 10
    progress_bar: bool = Field(True, description="false: with style auto, neither a bar nor lines")
    style: Literal["auto", "bar", "lines"] = Field(
        "auto", description="lines: one line per record; auto: a bar on a terminal, lines elsewhere"
    )
    wandb_project: str | None = Field(
        None, description="project of Weights & Biases that also gets the metrics (extra wandb); left out: none"
    )
    wandb_entity: str | None = Field(None, description="user or team of that project; left out: your default")


class CheckpointConfig(Section):
    """How often checkpoints are saved, and how many are kept."""

    interval_steps: Count = Field(0, description="0 = only after the last step")
    keep: Size = Field(2, description="number of complete checkpoints to keep")
    keep_every: Count = Field(
        0, description="keep the checkpoints of every so many steps for ever, beside the newest ones; 0 = off"
    )
    mirror: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://.")] | None = Field(
        None,
        description="address, such as s3://BUCKET/runs: every checkpoint is copied to its folder run.name, and a run "
        "whose own folder has no newer one resumes from there",
    )
    mirror_wait_seconds: Annotated[float, Field(ge=0)] = Field(
        1800.0, description="how long the end of a run waits for the copy of its last checkpoint"
    )


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
