"""The sections of a config about machines: the layout of ranks, the limits of a healthy run, and the device."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megastruct.config.section import MAX_SECONDS, Count, PathText, Section, Size, TensorSize


class ParallelConfig(Section):
    """How the ranks are divided into pipeline stages, tensor-parallel groups and replicas, and the ZeRO stage."""

    pp: TensorSize = Field(
        1, description="pipeline stages: groups of blocks on different devices. For models too large for one machine"
    )
    tp: TensorSize = Field(
        1,
        description="ranks that share every block's weights and split activations along the sequence. Keep it within "
        "one machine, whose links are fast",
    )
    dp: TensorSize | None = Field(None, description="replicas of the model. Left out: as many as the processes allow")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(
        1,
        description="what replicas share out: 0 nothing (fp32 only), 1 the optimizer's state, 2 gradients too, 3 "
        "weights too. 1 for pipelines and most runs; 2 and 3, without a pipeline, save memory and cost "
        "communication",
    )


class ReliabilityConfig(Section):
    """Limits after which a run ends itself and names the cause, and what keeps ranks in step.

    Causes are a dead, stopped or hanging rank, skipped steps and loss spikes; see docs/reliability.md.
    """

    silence_seconds: Annotated[float, Field(gt=0, le=MAX_SECONDS)] = Field(
        60.0, description="a rank that sends no heartbeat for this long is lost and ends the run"
    )
    collective_seconds: Annotated[float, Field(gt=0, le=MAX_SECONDS)] = Field(
        1800.0,
        description="longest time that ranks wait for each other. Raise it for very slow saves, compilations or disks",
    )
    max_skipped_steps: Count = Field(
        0,
        description="steps with a loss or gradient that is not finite, which are skipped; one more ends the run",
        json_schema_extra={"unit": "steps"},
    )
    spike_factor: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="after a loss above this x the recent median, the run goes back to the newest checkpoint and "
        "skips the data in between. 0: off. 2 catches real spikes; needs checkpoint.interval_steps",
    )
    spike_window_steps: Size = Field(50, description="recent losses in the median")
    max_spikes: Count = Field(3, description="how often a run goes back after a spike; one more spike ends it")
    deterministic: bool = Field(
        False,
        description="true: two runs on the same devices give the same bits, on GPUs too. Slower there; on CPUs they do "
        "so anyway",
    )
    gc_interval_steps: Count = Field(
        50,
        description="steps between two collections of Python's cyclic garbage, which all ranks make at once and at no "
        "other time. 0: Python's own collector, which stops each rank at other moments",
    )


class HardwareConfig(Section):
    """The device, and its peak for model FLOPs utilisation (MFU)."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the run trains. auto: on GPUs where there are any. cuda refuses a machine without"
    )
    compile_cache: PathText | None = Field(
        None,
        description="folder that keeps what torch.compile makes, for the next start. Left out: ~/.cache/megastruct "
        "(in $XDG_CACHE_HOME if that is set). The variable TORCHINDUCTOR_CACHE_DIR goes before it",
    )
    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="peak of one device in the run's precision, for the metric mfu. Left out: from a table of GPUs",
    )


class ProfilingConfig(Section):
    """What is recorded of chosen steps, and of a run that fails, in the folder `profile` of the run folder.

    Nothing of it changes what is trained.
    """

    steps: Annotated[tuple[Size, ...], Field(strict=False)] = Field(
        (),
        description="steps of which a trace is written, [10, 12]: the first one of a run is 1. Take some after the "
        "tenth, when everything is compiled. Left out: none",
        examples=["[10, 12]"],
    )
    ranks: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)] = Field(
        (0,), description="ranks that write traces and memory snapshots", examples=["[0]"]
    )
    memory_steps: Annotated[tuple[Size, ...], Field(strict=False)] = Field(
        (),
        description="steps after which a snapshot of the GPU's memory is written, with its history. Left out: none",
        examples=["[10]"],
    )
    memory_at_out_of_memory: bool = Field(
        False, description="write such a snapshot when a GPU has no memory left. true costs a little time in every step"
    )
    flight_recorder_entries: Count = Field(
        0,
        description="newest collectives that every rank remembers, and writes down when the run ends because a rank is "
        "lost or hangs. 0: off. 2000 is usual",
        json_schema_extra={"unit": "collectives"},
    )

    @property
    def takes_memory(self) -> bool:
        """Whether allocations are recorded."""
        return bool(self.memory_steps) or self.memory_at_out_of_memory

    @property
    def is_on(self) -> bool:
        """Whether anything is recorded on `ranks`."""
        return bool(self.steps) or self.takes_memory
