"""The global batch size of every step: constant, or warmed up by a list of stages or along a ramp.

Pure arithmetic. The sizes are part of what is trained, so they never follow from the layout; the checks of the config
only make sure that every size divides over the layout.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from pydantic import Field

from megastruct.config.section import Section, Size


class BatchStage(Section):
    """A stage of the batch-size warm-up: a global batch size, for a number of steps or of tokens."""

    batch_size: Size = Field(description="sequences per optimizer step in this stage")
    num_steps: Size | None = Field(None, description="length of the stage; set either num_steps or num_tokens")
    num_tokens: Size | None = Field(None, description="length of the stage in tokens, rounded to whole steps")


class BatchRamp(Section):
    """A linear warm-up of the batch size, from `start` in equal increments to `training.global_batch_size`."""

    start: Size = Field(description="sequences in the first optimizer step")
    increment: Size | None = Field(None, description="by how many sequences the batch grows; left out: `start`")
    num_steps: Size | None = Field(None, description="length of the ramp; set either num_steps or num_tokens")
    num_tokens: Size | None = Field(None, description="length of the ramp in tokens, of which every size gets as many")

    def sizes(self, global_batch_size: int) -> range:
        """The batch sizes of the ramp, without `global_batch_size` itself."""
        return range(self.start, global_batch_size, self.increment or self.start)


@dataclass(frozen=True)
class BatchSizes:
    """Batch sizes by step: `sizes[i]` from step `first_steps[i]` on."""

    sizes: tuple[int, ...]
    first_steps: tuple[int, ...]

    @property
    def is_constant(self) -> bool:
        """Whether there is no warm-up."""
        return len(self.sizes) == 1

    @property
    def first_samples(self) -> tuple[int, ...]:
        """The number of samples before each size's first step."""
        samples = [0]
        lengths = [later - first for first, later in zip(self.first_steps, self.first_steps[1:], strict=False)]
        for size, length in zip(self.sizes, lengths, strict=False):
            samples.append(samples[-1] + size * length)
        return tuple(samples)

    def at(self, step: int) -> int:
        """The batch size of the step that follows `step` finished steps."""
        return self.sizes[bisect_right(self.first_steps, step) - 1]

    def samples(self, num_steps: int) -> int:
        """The number of samples in the first `num_steps` steps."""
        stage = bisect_right(self.first_steps, num_steps) - 1
        return self.first_samples[stage] + (num_steps - self.first_steps[stage]) * self.sizes[stage]

    def steps_of(self, num_tokens: int, seq_length: int) -> int:
        """The number of steps whose tokens come nearest to `num_tokens`, at least 1."""
        stage = bisect_right([samples * seq_length for samples in self.first_samples], num_tokens) - 1
        left = num_tokens - self.first_samples[stage] * seq_length
        return max(1, self.first_steps[stage] + round(left / (self.sizes[stage] * seq_length)))


@cache
def batch_sizes(
    global_batch_size: int, seq_length: int, warmup: BatchRamp | tuple[BatchStage, ...] | None
) -> BatchSizes:
    """The sizes of a training section; stages that are rounded to no step are left out."""
    sizes, first_steps = [], [0]
    for size, num_steps in _stages(global_batch_size, seq_length, warmup):
        if num_steps:
            sizes.append(size)
            first_steps.append(first_steps[-1] + num_steps)
    return BatchSizes((*sizes, global_batch_size), tuple(first_steps))


def _stages(
    global_batch_size: int, seq_length: int, warmup: BatchRamp | tuple[BatchStage, ...] | None
) -> Iterator[tuple[int, int]]:
    """(batch size, number of steps) of the stages of a warm-up."""
    if isinstance(warmup, BatchRamp):
        sizes = warmup.sizes(global_batch_size)
        for index, size in enumerate(sizes):
            if warmup.num_steps:  # the borders are rounded, so that the ramp has exactly its length
                borders = [round(place * warmup.num_steps / len(sizes)) for place in (index, index + 1)]
                yield size, borders[1] - borders[0]
            else:
                yield size, max(1, round((warmup.num_tokens or 0) / len(sizes) / (size * seq_length)))
        return
    for stage in warmup or ():
        yield (
            stage.batch_size,
            stage.num_steps or max(1, round((stage.num_tokens or 0) / (stage.batch_size * seq_length))),
        )
