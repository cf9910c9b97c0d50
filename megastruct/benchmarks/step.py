"""A training step of a config, measured beside a plain PyTorch model in the same processes.

Both train one after the other, from random weights, on the same number of tokens a step: the engine of this project as
a run uses it, and the dense model of the same sizes (`plain_training.py`). Steps are timed one by one, each until its
loss is known on the host. A few further steps are traced, for their time by part.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.profiler import record_function

from megastruct.benchmarks.device import start_afresh, wait_for
from megastruct.benchmarks.plain_training import PlainTraining
from megastruct.benchmarks.tokens import Share, Tokens
from megastruct.config.schema import Config
from megastruct.engine.engine import build_engine
from megastruct.engine.ranges import named_ranges
from megastruct.engine.zero import empty_parameters
from megastruct.metrics.devices import peak_tflops
from megastruct.parallel.topology import Topology
from megastruct.planning.cost import dense_equivalent, training_flops_per_token
from megastruct.profiling.breakdown import Breakdown, breakdown
from megastruct.profiling.parts import STEP_RANGE
from megastruct.profiling.trace import read_trace
from megastruct.profiling.traces import trace_to
from megastruct.run.schedules import scheduled

TRACED_STEPS = 3


class Amount(NamedTuple):
    """How many steps are taken: first those that are not timed, then those that are."""

    warmup: int
    steps: int


@dataclass(frozen=True)
class Measured:
    """What was measured of one model. Times are in seconds, the longest of all ranks; parts are those of rank 0."""

    name: str
    tokens_per_step: int
    flops_per_token: float
    num_devices: int
    peak_tflops: float | None  # of one device
    first_step_seconds: float  # from nothing to the end of the first step
    step_seconds: tuple[float, ...]
    peak_bytes: int | None  # allocated on a GPU in a step, the largest of all ranks
    losses: tuple[float, ...]  # of all steps
    parts: Breakdown | None

    @property
    def seconds(self) -> float:
        """The median of the timed steps."""
        return median(self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together."""
        return self.tokens_per_step / self.seconds

    @property
    def tflops(self) -> float:
        """TFLOP/s of one device, by the formula of `planning/cost.py` for this model."""
        return self.tokens_per_second * self.flops_per_token / self.num_devices / 1e12

    @property
    def mfu(self) -> float | None:
        """The share of the device's peak; None if that is unknown."""
        return self.tflops / self.peak_tflops if self.peak_tflops else None


class _Model(NamedTuple):
    """A model that is ready to be trained; `step` trains the next global batch and returns its loss."""

    name: str
    step: Callable[[], float]
    flops_per_token: Callable[[], float]  # of the last step
    ranges: Callable[[], AbstractContextManager[None]]
    close: Callable[[], None]


def measure_product(
    config: Config, topology: Topology, device: torch.device, tokens: Tokens, amount: Amount, trace: Path
) -> Measured:
    """Measure the engine with the config as it stands, in its first steps. Collective.

    `trace`: the file of rank 0's trace.
    """
    build = partial(_build_product, config, topology, device, tokens)
    return _measure(build, config, device, amount, trace)


def measure_baseline(config: Config, device: torch.device, tokens: Tokens, amount: Amount, trace: Path) -> Measured:
    """Measure the plain dense model. Collective."""
    return _measure(partial(_build_baseline, config, device, tokens), config, device, amount, trace)


def start_compiler(device: torch.device) -> None:
    """Compile something small, so that neither model's first step pays for the start of the compiler."""
    torch.compile(lambda x: (x @ x).relu())(torch.ones(32, 32, device=device))


def _build_product(config: Config, topology: Topology, device: torch.device, tokens: Tokens) -> _Model:
    engine = build_engine(config, topology, device, 0, tokens.eod_id)
    share = Share(topology.dp_rank(dist.get_rank()), topology.dp_size, config.training.micro_batch_size)
    batches = tokens.read(share) if engine.reads_data else None
    done = 0

    def step() -> float:
        nonlocal done
        now = scheduled(config, done)
        engine.set_learning_rate(now.learning_rate)
        engine.set_alpha(now.alpha, done)
        done += 1
        return engine.train_batch(batches)

    def flops_per_token() -> float:
        return training_flops_per_token(config, engine.guidance.read_share() if engine.guidance else 0.0)

    def close() -> None:
        parameters = list(engine.module.parameters())
        engine.close()
        empty_parameters(parameters)  # the next model needs their memory

    structure = config.ffn.structure + (", guided" if engine.guidance else "")
    return _Model(f"megastruct, {structure}", step, flops_per_token, partial(named_ranges, engine), close)


def _build_baseline(config: Config, device: torch.device, tokens: Tokens) -> _Model:
    training = PlainTraining(config, device)
    batches = tokens.read(Share(training.replica, training.replicas, training.micro_batch_size))
    flops = training_flops_per_token(dense_equivalent(config))
    return _Model(training.name, lambda: training.train_batch(batches), lambda: flops, nullcontext, lambda: None)


def _measure(
    build: Callable[[], _Model], config: Config, device: torch.device, amount: Amount, trace: Path
) -> Measured:
    start_afresh(device)
    start = time.perf_counter()
    model = build()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # of making the first weights
    losses, seconds = [model.step()], []
    first_step_seconds = time.perf_counter() - start
    flops_per_token = model.flops_per_token()
    for index in range(1, amount.warmup + amount.steps):
        dist.barrier()
        start = time.perf_counter()
        losses.append(model.step())
        wait_for(device)
        if index >= amount.warmup:
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    parts = _traced(model, device, trace)
    model.close()
    slowest = _largest([first_step_seconds, *seconds, float(peak or 0)], device)
    return Measured(
        name=model.name,
        tokens_per_step=config.training.tokens_per_step,
        flops_per_token=flops_per_token,
        num_devices=dist.get_world_size(),
        peak_tflops=peak_tflops(device, config.training.precision, config.hardware.peak_tflops),
        first_step_seconds=slowest[0],
        step_seconds=tuple(slowest[1:-1]),
        peak_bytes=None if peak is None else int(slowest[-1]),
        losses=tuple(losses),
        parts=parts,
    )


def _traced(model: _Model, device: torch.device, path: Path) -> Breakdown | None:
    """Train a few steps, which rank 0 traces. Collective."""
    traces = dist.get_rank() == 0
    with model.ranges(), trace_to(path, device, announce=False) if traces else nullcontext():
        for _ in range(TRACED_STEPS):
            with record_function(STEP_RANGE):
                model.step()
                wait_for(device)
    return breakdown(read_trace(path)) if traces else None


def _largest(values: list[float], device: torch.device) -> list[float]:
    """The largest of each value over all ranks. Collective."""
    found = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()
