"""For which numbers of tokens the merged form of a structured linear is faster: measured once per device, and stored.

The measurement takes well under a second per size of linear. Its results are kept in
`$XDG_CACHE_HOME/megastruct/crossover.json` (~/.cache without the variable); removing the file measures anew.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megastruct.files import write_atomically
from megastruct.structures.sharded import ShardedLinear

TOKENS = tuple(2**power for power in range(13))  # 1 to 4,096; beyond, the FLOPs decide as at 4,096
CPU_TOKENS = 256  # beyond, a product takes long on a CPU, and nothing changes
REPETITIONS = 5
BUDGET_SECONDS = 2e-3  # of one timing, which is at least one call


@dataclass(frozen=True)
class Crossover:
    """`merged_faster[i]`: whether the merged form was faster for `TOKENS[i]` tokens; the last one holds beyond."""

    merged_faster: tuple[bool, ...]

    def merged_is_faster(self, num_tokens: int) -> bool:
        """Whether to use the merged form for so many tokens: what was measured for the nearest power of two."""
        return self.merged_faster[min(round(math.log2(max(1, num_tokens))), len(self.merged_faster) - 1)]


def cache_file() -> Path:
    """Where measurements are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megastruct" / "crossover.json"


def measured_crossover(linear: ShardedLinear, dtype: torch.dtype) -> Crossover:
    """The crossover of a linear of these sizes in `dtype` on the device of its weights, stored or measured now.

    A cache that cannot be read or written is no error: then it is measured each time.
    """
    device = linear.factors()[0].device
    key = " ".join(
        [
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x {torch.get_num_threads()}",
            torch.__version__,
            str(dtype).removeprefix("torch."),
            f"{linear.linear.numbers.name} {linear.in_features} -> {linear.out_features}",
            *(f"{name}={value}" for name, value in sorted(linear.sizes.items())),
        ]
    )
    stored = _read()
    if isinstance(found := stored.get(key), list) and found:
        return Crossover(tuple(map(bool, found)))
    crossover = measure(linear, dtype)
    with contextlib.suppress(OSError):
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        # Read again: another process may have added its own. The last one to write wins, the loser measures again.
        write_atomically(cache_file(), json.dumps(_read() | {key: crossover.merged_faster}, indent=1))
    return crossover


@torch.no_grad()
def measure(linear: ShardedLinear, dtype: torch.dtype) -> Crossover:
    """Time both forms with the weights' shapes in `dtype`, for every number of tokens."""
    factors = [factor.detach().to(dtype) for factor in linear.factors()]
    weight, maths = linear.to_dense().to(dtype), linear.linear.maths
    faster = []
    for tokens in TOKENS if weight.is_cuda else [tokens for tokens in TOKENS if tokens <= CPU_TOKENS]:
        x = torch.ones(tokens, 1, linear.in_features, dtype=dtype, device=weight.device)  # decoding: [b, 1, N]
        times = _seconds(partial(F.linear, x, weight), partial(maths.apply, x, *factors, bias=None))
        faster.append(times[0] < times[1])
    return Crossover(tuple(faster))


def _seconds(*functions: Callable[[], Tensor]) -> list[float]:
    """The fastest of several timings of each function, in turn, so that a disturbance meets all of them."""
    calls = [_calls(function) for function in functions]
    best = [math.inf] * len(functions)
    for _ in range(REPETITIONS):
        for index, (count, call) in enumerate(calls):
            best[index] = min(best[index], call() / count)
    return best


def _calls(function: Callable[[], Tensor]) -> tuple[int, Callable[[], float]]:
    """(number of calls in a timing, the timing) of a function that has been warmed up.

    On a GPU the calls are replayed as a CUDA graph, as in decoding, so that the host's speed does not matter.
    """
    device = function().device
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        count = max(1, int(BUDGET_SECONDS / (time.perf_counter() - start)))
        return count, lambda: _on_cpu(function, count)
    count = 20
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(count):
            function()
    return count, lambda: _on_gpu(graph)


def _on_cpu(function: Callable[[], Tensor], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        function()
    return time.perf_counter() - start


def _on_gpu(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _read() -> dict[str, Any]:
    try:
        found = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
