"""For which numbers of tokens the merged form of a structured linear is faster: measured once per device, and stored.

The measurement takes well under a second per size of linear. Its results are kept in
`$XDG_CACHE_HOME/megastruct/crossover.json` (~/.cache without the variable); removing the file measures anew.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megastruct.files import write_atomically
from megastruct.paths import user_cache
from megastruct.structures.product import linear as product
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
    return user_cache() / "crossover.json"


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
    """Time both forms with the weights' shapes in `dtype`, for every number of tokens.

    On a GPU, the calls take several copies of the weights in turn: in a model, other layers have pushed a layer's
    weights out of the L2 cache since its last call, and a form that reads fewer weights gains by it.
    """
    weight, maths = linear.to_dense().to(dtype), linear.linear.maths
    copies = 1
    if weight.is_cuda:
        copies += 2 * torch.cuda.get_device_properties(weight.device).L2_cache_size // weight.nbytes
    weights = [weight.clone() for _ in range(copies)]
    factors = [[factor.detach().to(dtype, copy=True) for factor in linear.factors()] for _ in range(copies)]
    faster = []
    for tokens in TOKENS if weight.is_cuda else [tokens for tokens in TOKENS if tokens <= CPU_TOKENS]:
        x = torch.ones(tokens, 1, linear.in_features, dtype=dtype, device=weight.device)  # decoding: [b, 1, N]
        merged, structured = _seconds(
            [partial(product, x, weight) for weight in weights],
            [partial(maths.apply, x, *own, bias=None) for own in factors],
        )
        faster.append(merged < structured)
    return Crossover(tuple(faster))


def _seconds(*variants: list[Callable[[], Tensor]]) -> list[float]:
    """The fastest of several timings of each variant, in turn, so that a disturbance meets all of them.

    A variant is a list of functions of equal cost, which are called one after the other.
    """
    calls = [_calls(functions) for functions in variants]
    best = [math.inf] * len(variants)
    for _ in range(REPETITIONS):
        for index, (count, call) in enumerate(calls):
            best[index] = min(best[index], call() / count)
    return best


def _calls(functions: list[Callable[[], Tensor]]) -> tuple[int, Callable[[], float]]:
    """(number of calls in a timing, the timing) of functions that have been warmed up.

    On a GPU the calls are replayed as a CUDA graph, as in decoding, so that the host's speed does not matter.
    """
    device = functions[0]().device
    if device.type != "cuda":
        count = max(1, int(BUDGET_SECONDS / _on_cpu(functions, 1)))
        return count, lambda: _on_cpu(functions, count)
    count = max(20, len(functions))
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        functions[0]()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph, stream=stream):
        for call in range(count):
            functions[call % len(functions)]()
    return count, lambda: _on_gpu(graph)


def _on_cpu(functions: list[Callable[[], Tensor]], count: int) -> float:
    start = time.perf_counter()
    for call in range(count):
        functions[call % len(functions)]()
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
