"""Traces and snapshots on a GPU: the kernels' names and launches are those of the installed PyTorch."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import record_function

from megastruct.config.system import ProfilingConfig
from megastruct.profiling.breakdown import breakdown
from megastruct.profiling.memory import MemoryHistory
from megastruct.profiling.parts import STEP_RANGE, Part
from megastruct.profiling.trace import read_trace
from megastruct.profiling.traces import trace_to

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("compiled", [False, True])
def test_parts_of_a_step(tmp_path: Path, compiled: bool) -> None:
    device, path = torch.device("cuda", torch.cuda.current_device()), tmp_path / "step.json.gz"
    model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024), nn.LayerNorm(1024)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    q = torch.randn(4, 16, 1024, 64, device=device, dtype=torch.bfloat16, requires_grad=True)

    def loss(x: torch.Tensor) -> torch.Tensor:
        attended = F.scaled_dot_product_attention(q, q, q, is_causal=True).float().mean()
        with torch.autocast("cuda", torch.bfloat16):
            y = model(x)
        return F.cross_entropy(y.float(), torch.zeros(len(x), dtype=torch.long, device=device)) + attended

    run = torch.compile(loss) if compiled else loss

    def step() -> None:
        for _ in range(2):
            run(torch.randn(4096, 1024, device=device)).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    with trace_to(path, device, announce=False), record_function(STEP_RANGE):
        step()
        torch.cuda.synchronize()
    found = breakdown(read_trace(path))
    every = {Part.PRODUCTS, Part.ATTENTION, Part.LOSS, Part.OPTIMIZER, Part.ELEMENT_WISE, Part.GRADIENT_ACCUMULATION}
    assert {part for part, spent in found.parts.items() if spent.total} >= every
    assert sum(spent.counted for spent in found.parts.values()) == pytest.approx(found.step)
    assert found.parts[Part.PRODUCTS].counted > found.parts[Part.LOSS].counted


def test_snapshots_after_a_step_and_when_memory_is_out(tmp_path: Path) -> None:
    history = MemoryHistory(ProfilingConfig(memory_steps=(2,), memory_at_out_of_memory=True), tmp_path, 0)
    kept = torch.ones(1 << 20, device="cuda")
    history.after_step(1)
    history.after_step(2)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 45, device="cuda")
    torch.cuda.memory._record_memory_history(enabled=None)
    names = {"memory_step_00000002_rank_0.pickle", "memory_out_of_memory_rank_0.pickle"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names:
        snapshot = pickle.loads((tmp_path / name).read_bytes())  # noqa: S301, written above
        blocks = [block for segment in snapshot["segments"] for block in segment["blocks"]]
        assert any(block["address"] == kept.data_ptr() for block in blocks)
        frames = [frame for block in blocks for frame in block["frames"]]
        assert any(frame["filename"].endswith("test_on_gpu.py") for frame in frames)
