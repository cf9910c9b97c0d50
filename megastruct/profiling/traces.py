"""Traces of chosen steps, as files of PyTorch's profiler in the run folder.

    runs/NAME/profile/step_00000010_rank_0.json.gz          Chrome trace: chrome://tracing, ui.perfetto.dev

A step that is trained again, after a crash or a spike, replaces its file. A file with its final name is complete.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

# Must be set before the profiler's library is first used: it would announce every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from megastruct.config.system import ProfilingConfig
from megastruct.profiling.files import FOLDER_NAME, write_file
from megastruct.profiling.memory import MemoryHistory
from megastruct.profiling.parts import STEP_RANGE


class StepProfiler:
    """Profiles the chosen steps of a run on the chosen ranks; on other ranks and steps it does nothing."""

    def __init__(self, config: ProfilingConfig, folder: Path, rank: int, device: torch.device) -> None:
        """`folder`: the run folder. Recording of memory begins here, if the config asks for it."""
        self._steps = frozenset(config.steps) if rank in config.ranks else frozenset()
        self._folder, self._rank, self._device = folder / FOLDER_NAME, rank, device
        self._memory = MemoryHistory(config, self._folder, rank) if rank in config.ranks else None

    @contextmanager
    def step(self, step: int, ranges: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """Around the training of step `step`, the first of a run being 1. `ranges` names parts of it in the trace."""
        if step not in self._steps:
            yield
        else:
            with (
                ranges(),
                trace_to(trace_file(self._folder, step, self._rank), self._device),
                record_function(STEP_RANGE),
            ):
                yield
        if self._memory:
            self._memory.after_step(step)


def trace_file(folder: Path, step: int, rank: int) -> Path:
    """The file of a step's trace in the folder `profile`."""
    return folder / f"step_{step:08d}_rank_{rank}.json.gz"


@contextmanager
def trace_to(path: Path, device: torch.device, announce: bool = True) -> Iterator[None]:
    """Write a Chrome trace of what runs inside to `path` (`.json` or `.json.gz`), and say so on stderr.

    If the code inside fails, there is no file. Time that the profiler itself takes lies outside.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    recorded = profile(activities=activities)
    _wait_for(device)
    with recorded:
        yield
        _wait_for(device)
    if device.type == "cuda" and not _has_kernels(recorded):
        reason = "another profiler may use the GPU, or counters are reserved for administrators"
        print(f"\nwarning: no kernel was recorded for {path}: {reason}", file=sys.stderr, flush=True)
    write_file(path, lambda temporary: recorded.export_chrome_trace(str(temporary)), "trace" if announce else "")


def _has_kernels(recorded: profile) -> bool:
    """Whether the GPU's time line is in the profile. The library's own warnings are off, see above."""
    results = recorded.profiler.kineto_results if recorded.profiler else None
    return results is None or any(event.device_type() == DeviceType.CUDA for event in results.events())


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
