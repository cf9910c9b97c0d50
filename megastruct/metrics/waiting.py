"""The time that a rank spends on communication and on waiting for other ranks in a training step.

Whoever communicates (a layer, DeepSpeed's pipeline, ZeRO) does it through torch.distributed's process groups. So that
is where it is seen, on every layout, while a step is trained:

- A call that is not asynchronous occupies this rank from its issue to its end; an asynchronous one occupies it while it
  is waited for. What overlaps with computation does not count.
- On CPUs the main thread is timed, for gloo blocks it. On GPUs the stream that computes is timed, by pairs of CUDA
  events: NCCL runs such calls on that stream, or has it wait for a stream of its own, as DeepSpeed has it wait for the
  streams on which ZeRO 2 and 3 communicate. The events are read when the step's loss has been read, and so after them:
  nothing waits for the measurement.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist

# What issues communication: methods of torch.distributed's process groups; a release need not have all of them.
_ISSUES = (
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "gather", "scatter", "barrier"),
    *("allgather", "_allgather_base", "allgather_into_tensor_coalesced", "all_gather_single"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "reduce_scatter_single"),
    *("alltoall", "alltoall_base", "all_to_all_single", "send", "recv", "recv_anysource"),
)


class Waiting:
    """Adds up the waits of one rank, over the steps since they were read last."""

    def __init__(self, device: torch.device, world_size: int) -> None:
        self._cuda, self._alone = device.type == "cuda", world_size == 1
        self._stream: Any = None  # on a GPU, the one that computes
        self._spans: list[tuple[Any, Any]] = []  # of the step that is being trained: two times, or two CUDA events
        self._unused_events: list[Any] = []

    @contextmanager
    def step(self) -> Iterator[Callable[[], float]]:
        """Watch one training step; gives a function for its seconds, to be called after the loss has been read."""
        if self._alone:
            yield lambda: 0.0
            return
        self._stream = torch.cuda.current_stream() if self._cuda else None
        with ExitStack() as undo:
            for name in _ISSUES:
                if name in vars(dist.ProcessGroup):
                    _replace(undo, dist.ProcessGroup, name, self._timed(_is_synchronous))
            _replace(undo, dist.Work, "wait", self._timed(_always))
            if self._cuda:
                _replace(undo, torch.cuda.Stream, "wait_event", self._timed(lambda own, *_: own == self._stream))
            yield self._read

    def _timed(self, counts: Callable[..., bool]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def timed(*args: Any, **kwargs: Any) -> Any:
                if not (_is_of_the_step() and self._computes_here() and counts(*args)):
                    return function(*args, **kwargs)
                start = self._now()
                try:
                    return function(*args, **kwargs)
                finally:
                    self._spans.append((start, self._now()))

            return timed

        return decorate

    def _computes_here(self) -> bool:
        return not self._cuda or torch.cuda.current_stream() == self._stream

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = self._unused_events.pop() if self._unused_events else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self) -> float:
        spans, self._spans = self._spans, []
        if not self._cuda:
            return sum(end - start for start, end in spans)
        ended = [span for span in spans if span[1].query()]
        self._spans = [span for span in spans if not span[1].query()]  # none, unless a call was left waiting for nobody
        self._unused_events += [event for span in ended for event in span]
        return sum(start.elapsed_time(end) for start, end in ended) / 1000


def _replace(undo: ExitStack, owner: Any, name: str, decorate: Callable[[Any], Any]) -> None:
    before = vars(owner)[name]  # not getattr: what it gives of a method in C++ would no longer be bound to objects
    setattr(owner, name, decorate(getattr(owner, name)))
    undo.callback(setattr, owner, name, before)


def _is_synchronous(*args: Any) -> bool:
    """Of a call of a method of process groups, whose options come last; sends have none, but are waited for."""
    return not getattr(args[-1], "asyncOp", True)


def _always(*_: Any) -> bool:
    return True


def _is_of_the_step() -> bool:
    """Not of a thread that was begun in Python: a save in the background communicates, too.

    The threads in which GPUs' backwards run are dummies to Python.
    """
    thread = threading.current_thread()
    return thread is threading.main_thread() or isinstance(thread, threading._DummyThread)
