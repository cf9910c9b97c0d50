"""tools/benchmark.py step and trace, as users start them: the numbers they print, and what they refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from forked import Forked
from marks import soak
from megastruct.commands import benchmark
from megastruct.config.load import load_config
from megastruct.planning.cost import dense_equivalent, training_flops_per_token

PARTS = {"products", "attention", "loss", "gradient_accumulation", "optimizer", "element_wise", "nothing_running"}
FEW = ("--steps", 2, "--warmup", 1)


def run(folder: Path, world_size: int, *arguments: Any) -> tuple[list[int | None], str]:
    """Exit codes and output, by rank, of the command on forked ranks."""
    with Forked(folder, folder, world_size, *arguments, main=benchmark.main) as forked:
        return forked.codes(seconds=500), forked.text()


def measured(folder: Path, world_size: int, *arguments: Any) -> tuple[dict[str, Any], str]:
    codes, text = run(folder, world_size, "step", *arguments, "--json", folder / "step.json", *FEW)
    assert codes == [0] * world_size, text
    return json.loads((folder / "step.json").read_text()), text


def check(values: dict[str, Any], config: Path, world_size: int) -> None:
    """Numbers that agree with each other, and losses of untrained models."""
    loaded = load_config(config)
    flops = {
        "megastruct": training_flops_per_token(loaded),
        "baseline": training_flops_per_token(dense_equivalent(loaded)),
    }
    for key, per_token in flops.items():
        found = values[key]
        seconds = sorted(found["step_seconds"])
        assert len(seconds) == 2 and found["tokens_per_second"] == pytest.approx(256 / (sum(seconds) / 2))
        assert found["tflops_per_device"] == pytest.approx(found["tokens_per_second"] * per_token / world_size / 1e12)
        assert found["mfu"] is None and found["peak_bytes"] is None  # on a CPU
        assert found["first_step_seconds"] > 0 and len(found["losses"]) == 3
        assert all(loss == pytest.approx(math.log(320), abs=0.2) for loss in found["losses"])
        parts = found["parts"]["parts"]
        elsewhere = {"loss"} if values["layout"]["pp"] > 1 and key == "megastruct" else set()
        assert {part for part, spent in parts.items() if spent["ms"]} >= PARTS - elsewhere
        assert sum(spent["ms"] for spent in parts.values()) == pytest.approx(found["parts"]["step_ms"])
    speeds = [values[key]["tokens_per_second"] for key in ("megastruct", "baseline")]
    assert values["ratio"] == pytest.approx(speeds[0] / speeds[1])


def test_one_process_and_its_trace(config: Path, tmp_path: Path) -> None:
    values, text = measured(tmp_path, 1, config, "--trace", tmp_path / "traces")
    check(values, config, 1)
    assert values["baseline"]["name"] == "PyTorch, dense" and "collectives" in values["megastruct"]["parts"]["parts"]
    assert f"{values['megastruct']['tokens_per_second']:,.0f}" in text and "2 steps after 1" in text
    codes, again = run(tmp_path, 1, "trace", tmp_path / "traces" / "megastruct_step.json.gz")
    assert codes == [0]
    table = [line for line in again.splitlines() if line.startswith("  ")]
    assert table and all(line in text for line in table)  # the same numbers from the file
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "world_size, overrides, baseline",
    [
        (2, (), "PyTorch, dense, FSDP2 x 2"),
        soak(2, ("parallel.tp=2",), "PyTorch, dense, FSDP2 x 1, TP x 2"),
        soak(2, ("parallel.pp=2",), "PyTorch, dense, FSDP2 x 2"),
        soak(4, ("parallel.tp=2", "parallel.zero_stage=3"), "PyTorch, dense, FSDP2 x 2, TP x 2"),
    ],
    ids=str,
)
def test_several_processes(
    config: Path, tmp_path: Path, world_size: int, overrides: tuple[str, ...], baseline: str
) -> None:
    values, _ = measured(tmp_path, world_size, config, *overrides)
    check(values, config, world_size)
    assert values["baseline"]["name"] == baseline
    assert values["megastruct"]["parts"]["parts"]["collectives"]["ms"] > 0


@pytest.mark.soak
@pytest.mark.parametrize(
    "overrides",
    [
        ("--tokens", "data"),
        ("--tokens", "data", "training.document_attention=separate"),
        ("guided.schedule=fixedstep",),
        ("training.precision=bf16", "training.compile=true"),
        ("optimizer.kind=muon", "training.z_loss=1e-4"),
    ],
    ids=str,
)
def test_other_configs(config: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    values, _ = measured(tmp_path, 1, config, *overrides)
    assert all(math.isfinite(loss) for key in ("megastruct", "baseline") for loss in values[key]["losses"])
    assert values["tokens"] == ("data" if "data" in overrides else "synthetic")


@pytest.mark.parametrize(
    "arguments, found",
    [
        (("--tokens", "data", "data.path=nowhere", "--json", "no/folder/x.json"), ["data.path", "--json: there is no"]),
        (("ffn.rank=0", "parallel.tp=3"), ["ffn.rank", "parallel.tp"]),
        (("parallel.dp=2",), ["parallel.dp: pp 1 x dp 2 needs 2 processes, 1 were started"]),
        (("--steps", 0), ["--steps: 0 is less than 1"]),
        (("--json", "."), ["--json: . is a folder"]),
    ],
    ids=str,
)
def test_mistakes_are_one_message(config: Path, tmp_path: Path, arguments: tuple[str, ...], found: list[str]) -> None:
    codes, text = run(tmp_path, 1, "step", config, *arguments)
    assert codes == [2] and "Traceback" not in text and text.count("error: ") == 1, text
    assert all(problem in text for problem in found), text
