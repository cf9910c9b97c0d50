"""What ran in each step of a trace: reads the Chrome traces that PyTorch's profiler writes.

On a GPU, kernels and copies run on the device's time line. On a CPU, operators do; of an operator that calls others,
the time between the calls counts as its own. Times are microseconds on the trace's own clock.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megastruct.errors import Problem, UserError
from megastruct.profiling.intervals import Interval
from megastruct.profiling.parts import DATA_RANGE, STEP_RANGE

_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_ON_HOST = ("cpu_op", "user_annotation")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
# Of what runs on a CPU, what computes or communicates; the rest is PyTorch's own work between two operators.
_COMPUTES = ("aten::", "mkldnn::", "mkl::", "onednn::", "gloo:", "## Call CompiledFxGraph", "CompiledFunction")


class Event(NamedTuple):
    """A stretch of time in which one kernel ran, or an operator of the CPU itself."""

    name: str
    start: float
    end: float
    ranges: tuple[str, ...] = ()  # open when it was launched, the outermost first


@dataclass(frozen=True)
class Trace:
    """The steps of a trace: their times, what ran, and when the host waited for data."""

    steps: tuple[Interval, ...]
    events: tuple[Event, ...]
    data: tuple[Interval, ...]


def read_trace(path: Path) -> Trace:
    """Read a Chrome trace, `.json` or `.json.gz`.

    Raises UserError if the file cannot be read, is no trace, or has no step of this project in it.
    """
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            events = json.load(file)["traceEvents"]
        trace = parse_trace(events)
    except OSError as error:
        raise UserError(
            Problem(str(path), f"cannot be read: {error.strerror or error}", "a file in profile/")
        ) from None
    except (ValueError, KeyError, TypeError, EOFError, AttributeError):
        suggestion = "a file that profiling.steps has written"
        raise UserError(Problem(str(path), "it is no trace of PyTorch's profiler", suggestion)) from None
    if not trace.steps:
        raise UserError(
            Problem(str(path), "there is no training step in it", "a file that profiling.steps has written")
        )
    return trace


def parse_trace(events: Iterable[dict[str, Any]]) -> Trace:
    """The steps of a trace's `traceEvents`."""
    complete = [event for event in events if event.get("ph") == "X"]
    host = [event for event in complete if event.get("cat") in _ON_HOST]
    device = [event for event in complete if event.get("cat") in _ON_DEVICE]
    named = {
        name: tuple(sorted(_interval(event) for event in host if event["name"] == name))
        for name in (STEP_RANGE, DATA_RANGE)
    }
    launches = [event for event in complete if event.get("cat") in _LAUNCHES] if device else []
    found = list(_kernels(device, host, launches) if device else _own_times(host))
    return Trace(named[STEP_RANGE], tuple(found), named[DATA_RANGE])


def _interval(event: dict[str, Any]) -> Interval:
    return float(event["ts"]), float(event["ts"]) + float(event.get("dur", 0.0))


def _kernels(
    device: Sequence[dict[str, Any]], host: Sequence[dict[str, Any]], launches: Sequence[dict[str, Any]]
) -> Iterator[Event]:
    """Every kernel with the ranges that were open on the thread that launched it."""
    ranges_of: dict[Any, tuple[str, ...]] = {}  # by the correlation of the launch
    for opened in _by_thread(host, launches).values():
        for event, stack in _walk(opened):
            if event.get("cat") in _LAUNCHES:
                ranges_of[_correlation(event)] = tuple(outer["name"] for outer in stack)
    for event in device:
        yield Event(event["name"], *_interval(event), ranges_of.get(_correlation(event), ()))


def _own_times(host: Sequence[dict[str, Any]]) -> Iterator[Event]:
    """The times in which an operator of the CPU ran itself, not another one that it had called."""
    for opened in _by_thread(host).values():
        order: list[tuple[dict[str, Any], tuple[str, ...]]] = []
        children: dict[int, list[Interval]] = defaultdict(list)
        for event, stack in _walk(opened):
            order.append((event, tuple(outer["name"] for outer in stack)))
            if stack:
                children[id(stack[-1])].append(_interval(event))
        for event, ranges in order:
            if not event["name"].startswith(_COMPUTES):
                continue
            start, end = _interval(event)
            for child_start, child_end in [*children[id(event)], (end, end)]:
                if start < child_start:
                    yield Event(event["name"], start, child_start, ranges)
                start = max(start, child_end)


def _by_thread(*groups: Sequence[dict[str, Any]]) -> dict[Any, list[dict[str, Any]]]:
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for group in groups:
        for event in group:
            threads[event.get("pid"), event.get("tid")].append(event)
    return threads


def _walk(events: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Every event of one thread with those around it, the outermost first. The list is changed by the next one."""
    stack: list[dict[str, Any]] = []
    for event in sorted(events, key=lambda event: (float(event["ts"]), -float(event.get("dur", 0.0)))):
        start = float(event["ts"])
        while stack and _interval(stack[-1])[1] <= start:
            stack.pop()
        yield event, stack
        stack.append(event)


def _correlation(event: dict[str, Any]) -> Any:
    return event.get("args", {}).get("correlation")
