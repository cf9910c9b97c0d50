"""A self-guided run: what it shows while the guides are there, their end, the tokens read again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from forked import train_forked
from megastruct.run.guided_phase import REPORT_FILE
from megastruct.start import main
from processes import ROOT, environment, losses, read_metrics, start, start_and_kill

# 12 base steps, guided for the first 6, whose tokens are read again at the end
GUIDED = ["guided.schedule=fixedflop", "guided.fraction=0.5", "guided.levels=4", "parallel.pp=2"]
TOTAL = 18


def generate(run: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    tool, prompt = ROOT / "tools" / "generate.py", ["--prompt", "the", "--max-new-tokens", "4"]
    command = [sys.executable, tool, run, *prompt, *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def test_a_guided_run(config: Path, tmp_path: Path) -> None:
    whole_run(config, tmp_path)


def whole_run(config: Path, tmp_path: Path) -> Path:
    """A guided run from start to end."""
    train_forked(tmp_path, tmp_path / "runs" / "undisturbed", 2, config, "run.name=undisturbed", *GUIDED)
    whole = tmp_path / "runs" / "undisturbed"
    _check_metrics(whole)
    report = json.loads((whole / REPORT_FILE).read_text())
    assert report["step"] == 6 and [set(rank) for rank in report["ranks"]] == [{"before_bytes", "after_bytes"}] * 2
    return whole


@pytest.mark.soak
def test_a_guided_run_killed_on_both_sides_of_the_border(config: Path, tmp_path: Path) -> None:
    whole = whole_run(config, tmp_path)
    run = tmp_path / "runs" / "killed"
    start_and_kill(run, 4, config, "run.name=killed", *GUIDED)
    start_and_kill(run, 6, config, "run.name=killed", *GUIDED)
    start_and_kill(run, 14, config, "run.name=killed", *GUIDED)  # inside what is read again
    last = start(config, "run.name=killed", *GUIDED)
    assert last.returncode == 0, last.stderr
    assert losses(run) == losses(whole)
    assert generate(run).returncode == 0


@pytest.mark.soak
def test_a_checkpoint_with_guides_is_served_when_asked_for_only(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "test"
    arguments = ["training.num_steps=1000", "guided.schedule=fixedstep", "guided.fraction=1.0", "guided.levels=4"]
    start_and_kill(run, 10, config, *arguments)  # the save of step 9 waits for those before
    asked = generate(run)
    assert asked.returncode == 2 and re.search(r"inside the guided phase \(step \d of 1000\)", asked.stderr)
    assert "--allow-guided" in asked.stderr and "Traceback" not in asked.stderr
    assert generate(run, "--allow-guided").returncode == 0


def _check_metrics(run: Path) -> None:
    records = read_metrics(run)
    assert [record["step"] for record in records] == list(range(1, TOTAL + 1))
    assert [record["step"] for record in records if "alpha" in record] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if "validation_loss" in record] == [6, 12, 18]
    alphas = [record["alpha"] for record in records[:6]]
    assert alphas[0] == 1.0 and alphas == sorted(alphas, reverse=True)
    assert records[0]["guide_share"] == 1.0 and 0.0 <= records[5]["guide_share"] < 0.5
    assert records[5]["validation_loss_guided"] == records[5]["validation_loss"]  # alpha is 0 by then
    assert records[0]["tflops_per_device"] > 0
    distances = {key: value for key, value in records[5].items() if key.startswith("guide_distance/")}
    assert set(distances) == {"guide_distance/blocks.1.fc1", "guide_distance/blocks.1.fc2"}
    assert all(0.0 < value < 10.0 for value in distances.values())
    board = EventAccumulator(str(run))
    board.Reload()
    guided = {"6_guided/alpha", "6_guided/share", "1_loss/validation_guided"}
    guided |= {"6_guided/distance_mean", "6_guided/distance_max"}
    assert guided <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("6_guided/alpha")] == [1, 2, 3, 4, 5, 6]
    assert board.Scalars("6_guided/distance_max")[0].value == pytest.approx(max(distances.values()))


def test_a_run_that_could_not_be_guided_says_so(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for overrides, found in (
        (
            ("guided.schedule=fixedflop", "guided.levels=5", "ffn.rank=12", "training.num_steps=1"),
            "guided.levels: 5 does not divide training.seq_length = 32",
        ),
        (
            ("guided.schedule=fixedstep", "guided.fraction=0.01"),
            "guided.schedule: no guided step of training's 12 base steps",
        ),
    ):
        with pytest.raises(SystemExit) as end:
            main([str(config), *overrides])
        assert end.value.code == 2 and found in capsys.readouterr().err
