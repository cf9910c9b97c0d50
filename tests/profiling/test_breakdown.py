"""Times by part: of hand-made events in numbers, and of a step that PyTorch's profiler has recorded on a CPU."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import record_function

from megastruct.errors import UserError
from megastruct.profiling.breakdown import Spent, as_json, breakdown, breakdown_lines
from megastruct.profiling.parts import DATA_RANGE, STEP_RANGE, Part
from megastruct.profiling.trace import parse_trace, read_trace
from megastruct.profiling.traces import trace_to

CPU = torch.device("cpu")


def event(
    cat: str, name: str, start: float, end: float, thread: int = 1, correlation: int | None = None
) -> dict[str, Any]:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "pid": 1, "tid": thread, "args": args}


def gpu_step(start: float) -> list[dict[str, Any]]:
    """A step of 100 ms: products 0-40, its reduction 30-60 beside them and beside an addition 45-50, AdamW 70-90."""
    ms = 1000.0
    at = start * ms
    adds = "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad"
    host = [
        ("user_annotation", STEP_RANGE, 0, 100, 1),
        ("user_annotation", DATA_RANGE, 0, 8, 1),
        ("user_annotation", DATA_RANGE, 92, 96, 1),
        ("cpu_op", adds, 10, 20, 2),
        ("cpu_op", "aten::add_", 11, 19, 2),
        ("user_annotation", "Optimizer.step#AdamW.step", 30, 40, 1),
    ]
    launches = [(5.0, 1, 1), (12.0, 2, 2), (12.5, 2, 3), (35.0, 1, 4)]  # start, thread, correlation
    kernels = [
        ("kernel", "nvjet_tst_192x192_64x4", 0, 40, 1),
        ("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL", 30, 60, 2),
        ("kernel", "vectorized_elementwise_kernel<CUDAFunctor_add>", 45, 50, 3),
        ("kernel", "multi_tensor_apply_kernel", 70, 90, 4),
    ]
    return [
        *(event(cat, name, at + a * ms, at + b * ms, thread) for cat, name, a, b, thread in host),
        *(
            event("cuda_runtime", "cudaLaunchKernel", at + a * ms, at + a * ms + 5, t, c + start)
            for a, t, c in launches
        ),
        *(event(cat, name, at + a * ms, at + b * ms, 7, c + start) for cat, name, a, b, c in kernels),
        {"ph": "i", "name": "no stretch of time", "ts": at},
    ]


def test_parts_add_up_to_the_step_and_communication_is_exposed_where_nothing_computes() -> None:
    found = breakdown(parse_trace([*gpu_step(0), *gpu_step(200)]))
    assert (found.step, found.num_steps) == (100.0, 2)
    expected = {
        Part.PRODUCTS: Spent(40, 40),
        Part.GRADIENT_ACCUMULATION: Spent(5, 5),
        Part.OPTIMIZER: Spent(20, 20),
        Part.COLLECTIVES: Spent(30, 15),  # 40-45 and 50-60
        Part.DATA: Spent(4, 4),  # 92-96: before 8 products run
        Part.NOTHING: Spent(16, 16),  # 60-70, 90-92, 96-100
    }
    assert {part: spent for part, spent in found.parts.items() if spent.total} == pytest.approx(expected)
    assert sum(spent.counted for spent in found.parts.values()) == pytest.approx(100)
    assert as_json(found)["parts"]["collectives"] == {"ms": 15.0, "total_ms": 30.0}
    [line] = [line for line in breakdown_lines(found) if "collectives" in line]
    assert "15.00 ms" in line and "15.0%" in line and "of 30.00 ms" in line


def test_an_operator_of_a_cpu_counts_without_those_that_it_calls() -> None:
    """`aten::addmm` of 10 ms copies for 2 of them; a gap of 5 is nobody's."""
    events = [
        event("user_annotation", STEP_RANGE, 0, 20_000),
        event("cpu_op", "aten::linear", 0, 15_000),
        event("cpu_op", "aten::addmm", 0, 10_000),
        event("cpu_op", "aten::copy_", 1_000, 3_000),
        event("cpu_op", "AddmmBackward0", 15_000, 20_000),
    ]
    parts = breakdown(parse_trace(events)).parts
    assert parts[Part.PRODUCTS] == Spent(8, 8) and parts[Part.ELEMENT_WISE] == Spent(7, 7)
    assert parts[Part.NOTHING] == Spent(5, 5)


def test_a_recorded_step(tmp_path: Path) -> None:
    """Of a step in which attention, products, the loss and the optimizer have known sizes, each is found."""
    path = tmp_path / "profile" / "step.json.gz"
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 1000))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    q = torch.randn(1, 4, 256, 64)
    for _ in range(2):
        model(torch.randn(64, 256)).sum().backward()  # makes gradients, to which those of the step are added
    with trace_to(path, CPU, announce=False), record_function(STEP_RANGE):
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
        F.cross_entropy(model(torch.randn(64, 256)), torch.zeros(64, dtype=torch.long)).backward()
        optimizer.step()
    trace = read_trace(path)
    found = breakdown(trace)
    every = {Part.PRODUCTS, Part.ATTENTION, Part.LOSS, Part.OPTIMIZER, Part.ELEMENT_WISE, Part.GRADIENT_ACCUMULATION}
    assert {part for part, spent in found.parts.items() if spent.total > 0} == {*every, Part.NOTHING}
    assert sum(spent.counted for spent in found.parts.values()) == pytest.approx(found.step)
    assert all(spent.counted == pytest.approx(spent.total) for spent in found.parts.values())  # one thread
    assert [path.name for path in path.parent.iterdir()] == ["step.json.gz"]
    before = path.stat().st_ino
    with trace_to(path, CPU, announce=False), record_function(STEP_RANGE):
        q.add(1)
    assert path.stat().st_ino != before and len(read_trace(path).events) < len(trace.events)


@pytest.mark.parametrize(
    "content, found",
    [
        (None, "cannot be read"),
        (b"no gzip", "cannot be read"),
        (gzip.compress(b"{"), "no trace"),
        (gzip.compress(b"{}"), "no trace"),
        (gzip.compress(json.dumps({"traceEvents": [event("cpu_op", "aten::mm", 0, 1)]}).encode()), "no training step"),
        (gzip.compress(b'{"traceEvents": []}')[:-9], "no trace"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, content: bytes | None, found: str) -> None:
    path = tmp_path / "trace.json.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=found):
        read_trace(path)
