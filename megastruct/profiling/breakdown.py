"""The time of a step by part, so that the parts add up to the step."""

from __future__ import annotations

from dataclasses import dataclass

from megastruct.profiling.intervals import Interval, intersect, length, subtract, union
from megastruct.profiling.parts import COMMUNICATION, COMPUTE, Part, part_of
from megastruct.profiling.trace import Trace

LABELS: dict[Part, str] = {
    Part.PRODUCTS: "matrix products",
    Part.ATTENTION: "attention",
    Part.LOSS: "loss",
    Part.GRADIENT_ACCUMULATION: "gradient accumulation",
    Part.OPTIMIZER: "optimizer, norm and clipping",
    Part.ELEMENT_WISE: "element-wise, norms and copies",
    Part.COLLECTIVES: "collectives, exposed",
    Part.STAGE_TRANSFERS: "waiting for another stage",
    Part.DATA: "waiting for data",
    Part.NOTHING: "nothing running",
}


@dataclass(frozen=True)
class Spent:
    """Milliseconds of a step, the mean over the traced steps.

    `total`: in which the part ran. `counted`: in which it ran and no part before it did, in the order of `Part`, so
    that the counted times of all parts add up to the step. Of communication this is the exposed time, in which nothing
    is computed.
    """

    total: float
    counted: float


@dataclass(frozen=True)
class Breakdown:
    """Where the time of a step goes: milliseconds, means over `num_steps` traced steps."""

    step: float
    num_steps: int
    parts: dict[Part, Spent]


def breakdown(trace: Trace) -> Breakdown:
    """The time of the trace's steps by part. The trace has at least one step.

    Kernels that run beside each other are counted once, for the first of their parts. What is left of a step is time
    in which the host waited for data, or in which nothing ran for another reason.
    """
    steps = union(trace.steps)
    running: dict[Part, list[Interval]] = {part: [] for part in (*COMPUTE, *COMMUNICATION)}
    known: dict[tuple[str, tuple[str, ...]], Part] = {}  # few kernels run many times
    for event in trace.events:
        key = event.name, event.ranges
        if key not in known:
            known[key] = part_of(*key)
        running[known[key]].append((event.start, event.end))
    sets = {part: intersect(union(intervals), steps) for part, intervals in running.items()}
    sets[Part.DATA] = intersect(union(trace.data), steps)
    sets[Part.NOTHING] = steps
    return Breakdown(length(steps) / len(trace.steps) / 1000, len(trace.steps), _counted(sets, len(trace.steps)))


def _counted(sets: dict[Part, list[Interval]], num_steps: int) -> dict[Part, Spent]:
    """From the set of times of each part, in microseconds, the milliseconds of one step."""
    parts, before = {}, list[Interval]()
    for part, times in sets.items():
        alone = subtract(times, before)
        total = length(alone if part in (Part.DATA, Part.NOTHING) else times)
        parts[part] = Spent(total / num_steps / 1000, length(alone) / num_steps / 1000)
        before = union([*before, *times])
    return parts


def breakdown_lines(found: Breakdown) -> list[str]:
    """A table: each part's counted milliseconds, its share of the step, and for communication its whole time."""
    lines = []
    for part, spent in found.parts.items():
        if spent.total or part is Part.NOTHING:
            whole = (
                f"   of {spent.total:.2f} ms, the rest beside other parts"
                if spent.total > 1.001 * spent.counted
                else ""
            )
            share = spent.counted / found.step if found.step else 0.0
            lines.append(f"  {LABELS[part]:<34}{spent.counted:10.2f} ms  {share:6.1%}{whole}")
    return lines


def as_json(found: Breakdown) -> dict[str, object]:
    """Plain values: milliseconds of a step, and of each part its total and its counted time."""
    parts = {str(part): {"ms": spent.counted, "total_ms": spent.total} for part, spent in found.parts.items()}
    return {"step_ms": found.step, "num_steps": found.num_steps, "parts": parts}
