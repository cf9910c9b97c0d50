"""The record of bounds: what is noted, and its table."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bounds
from bounds import within


def test_differences_are_noted_and_the_largest_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BOUNDS_FILE", raising=False)
    assert within(1.0, 1.0, "loss") and not within(1.0 + 1e-9, 1.0, "loss") and not within(math.nan, 1.0, "loss")
    file = tmp_path / "bounds.jsonl"
    monkeypatch.setenv("BOUNDS_FILE", str(file))
    for measured in (1e-7, 5e-7, 2e-7):
        assert within(measured, 1e-6, "loss")
    assert not within(torch.tensor(math.nan), 0.5, "weight")
    assert within(0.25, 0.5, "weight")
    printed = subprocess.run([sys.executable, bounds.__file__, file], capture_output=True, text=True, check=True)
    case = "tests/test_bounds.py::test_differences_are_noted_and_the_largest_is_shown"
    assert printed.stdout.splitlines()[2:] == [
        f"| `{case}` | loss | 5e-07 | 1e-06 | 50% |",
        f"| `{case}` | weight | nan | 0.5 | nan% |",
    ]
