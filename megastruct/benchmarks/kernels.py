"""Feed-forward layers alone, structured beside dense: how exact they are, and the times of forward and backward.

A layer is timed as it is trained: weights, input and gradients in one dtype, the forward keeps what the backward needs,
and the backward makes the gradients of the input and of all weights. Nothing is timed that was not checked before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from megastruct.benchmarks.device import start_afresh, wait_for
from megastruct.benchmarks.exactness import BOUNDS, forward_and_backward, relative_errors
from megastruct.benchmarks.ffn import FFN
from megastruct.metrics.devices import memory_there_bytes

FEWEST_INPUTS, MOST_INPUTS = 2, 32
CPU_CACHE_BYTES = 64 << 20  # about the last level's; GPUs say what they have
# What a CPU's allocator, the compiler and the driver, and cuBLAS say: they raise a plain RuntimeError.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
BATCH = 8  # rows of a batch: tensors are [s, b, features], as in the model


class Calls(NamedTuple):
    """How often a layer is called: first without a clock, then with it."""

    warmup: int
    timed: int


class Setting(NamedTuple):
    """What is the same for the layers that are compared."""

    tokens: int
    compiled: bool
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Measured:
    """One layer. `errors` are relative errors by name; seconds are those of every timed call.

    `problem` says why there are no times: the layer does not fit into memory, or it is wrong.
    """

    layer: FFN
    setting: Setting
    errors: dict[str, float] = field(default_factory=dict)
    forward_seconds: tuple[float, ...] = ()
    forward_backward_seconds: tuple[float, ...] = ()
    problem: str = ""

    @property
    def forward(self) -> float | None:
        """Seconds of the forward, the median."""
        return median(self.forward_seconds) if self.forward_seconds else None

    @property
    def forward_backward(self) -> float | None:
        """Seconds of forward and backward, the median."""
        return median(self.forward_backward_seconds) if self.forward_backward_seconds else None

    @property
    def forward_flops(self) -> int:
        """FLOPs of the forward over all tokens."""
        return self.layer.forward_flops * self.setting.tokens

    @property
    def forward_backward_flops(self) -> int:
        """FLOPs of forward and backward over all tokens."""
        return 3 * self.forward_flops

    @property
    def tflops(self) -> float | None:
        """TFLOP/s of forward and backward."""
        seconds = self.forward_backward
        return self.forward_backward_flops / seconds / 1e12 if seconds else None

    @property
    def worst_error(self) -> tuple[str, float]:
        """The result that is furthest from float64, and its relative error; NaN is further than any number."""
        return max(self.errors.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])

    @property
    def is_wrong(self) -> bool:
        """Whether an error is beyond the bound of the dtype."""
        return bool(self.errors) and not self.worst_error[1] <= BOUNDS[self.setting.dtype]


@dataclass(frozen=True)
class Compared:
    """A layer beside the dense one in the same setting, which was measured just before. None: one has no times."""

    measured: Measured
    dense: Measured

    @property
    def forward_speed_up(self) -> float | None:
        """The dense layer's time over this one's, forward."""
        return _ratio(self.dense.forward, self.measured.forward)

    @property
    def speed_up(self) -> float | None:
        """The dense layer's time over this one's, forward and backward."""
        return _ratio(self.dense.forward_backward, self.measured.forward_backward)

    @property
    def bound(self) -> float:
        """The dense layer's FLOPs over this one's: the speed-up if FLOPs alone decided. Forward and backward alike."""
        return self.dense.layer.forward_flops / self.measured.layer.forward_flops

    @property
    def share_of_bound(self) -> float | None:
        """`speed_up` as a share of `bound`."""
        return None if self.speed_up is None else self.speed_up / self.bound


def compare(layers: Iterable[FFN], setting: Setting, calls: Calls) -> Iterator[Compared]:
    """Measure the layers, of which the first is the dense one, and yield each result as soon as it is known."""
    dense: Measured | None = None
    for layer in layers:
        measured = measure(layer, setting, calls)
        dense = dense or measured
        yield Compared(measured, dense)


def measure(layer: FFN, setting: Setting, calls: Calls) -> Measured:
    """Check a layer, then time it. One that does not fit into memory, or is wrong, has no times."""
    start_afresh(setting.device)
    if least_bytes(layer, setting) <= memory_there_bytes(setting.device.type):
        try:
            return _measure(layer, setting, calls)
        except torch.OutOfMemoryError:
            pass
        except RuntimeError as error:
            if not any(words in str(error) for words in OUT_OF_MEMORY):
                raise
    return Measured(layer, setting, problem="does not fit into memory")


def least_bytes(layer: FFN, setting: Setting) -> int:
    """What a layer needs at the least: weights and gradients, the dense reference in float64, inputs and outputs."""
    values = 2 * layer.weights + setting.tokens * FEWEST_INPUTS * (layer.in_features + layer.out_features)
    return setting.dtype.itemsize * values + 16 * layer.dense().weights


def _measure(layer: FFN, setting: Setting, calls: Calls) -> Measured:
    device = setting.device
    module = layer.build(device, setting.dtype)
    if setting.compiled:
        module.compile()
    inputs = draw_inputs(layer, setting)
    errors = relative_errors(module, *inputs[0])
    checked = Measured(layer, setting, errors)
    if checked.is_wrong:
        name, error = checked.worst_error
        bound = BOUNDS[setting.dtype]
        return Measured(layer, setting, errors, problem=f"wrong, not timed: {name} is off by {error:.2g} > {bound:g}")
    forward = seconds_of(lambda index: module(inputs[index % len(inputs)][0]), calls, device)
    both = seconds_of(lambda index: forward_and_backward(module, *inputs[index % len(inputs)]), calls, device)
    return Measured(layer, setting, errors, forward, both)


def draw_inputs(layer: FFN, setting: Setting) -> list[tuple[Tensor, Tensor]]:
    """Inputs [s, b, N] and gradients of the output [s, b, M], from N(0, 1).

    They are so many that a pair has left the device's cache when its turn comes again.
    """
    device, dtype = setting.device, setting.dtype
    batch = math.gcd(setting.tokens, BATCH)
    length = setting.tokens // batch
    pair_bytes = dtype.itemsize * setting.tokens * (layer.in_features + layer.out_features)
    number = min(max(math.ceil(2 * _cache_bytes(device) / pair_bytes), FEWEST_INPUTS), MOST_INPUTS)
    generator = torch.Generator(device).manual_seed(1)

    def draw(width: int) -> Tensor:
        return torch.empty(length, batch, width, dtype=dtype, device=device).normal_(generator=generator)

    return [(draw(layer.in_features).requires_grad_(), draw(layer.out_features)) for _ in range(number)]


def seconds_of(call: Callable[[int], object], calls: Calls, device: torch.device) -> tuple[float, ...]:
    """Seconds of every timed call; a call gets its number.

    A GPU's clock is read by events on its stream, and the host runs ahead: its own time counts only where the GPU waits
    for it.
    """
    for index in range(calls.warmup):
        call(index)
    wait_for(device)
    numbers = range(calls.warmup, calls.warmup + calls.timed)
    if device.type != "cuda":
        return tuple(_host_seconds(call, index) for index in numbers)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in numbers]
    for index, (start, end) in zip(numbers, events, strict=True):
        start.record()
        call(index)
        end.record()
    wait_for(device)
    return tuple(start.elapsed_time(end) / 1e3 for start, end in events)


def _host_seconds(call: Callable[[int], object], index: int) -> float:
    start = time.perf_counter()
    call(index)
    return time.perf_counter() - start


def _cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_CACHE_BYTES


def _ratio(dense: float | None, own: float | None) -> float | None:
    return dense / own if dense and own else None
