"""Whole runs as users start them: launcher, pipeline, checkpoints, metrics, kill and resume."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from marks import soak
from megastruct.config import load_config
from megastruct.metrics.writers import TENSORBOARD_TAGS
from megastruct.start import main
from processes import (
    ROOT,
    Corpus,
    environment,
    losses,
    read_metrics,
    start,
    start_and_kill,
)

GUIDED = {"alpha", "guide_share", "validation_loss_guided"}  # of self-guided runs


@pytest.fixture(scope="module")
def shared_memory() -> set[str]:
    return buffers_in_shared_memory()


def buffers_in_shared_memory() -> set[str]:
    """Semaphores of other processes come and go; what DeepSpeed would leave are buffers."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


def test_a_run_with_two_stages_and_what_it_leaves(
    config: Path, tmp_path: Path, shared_memory: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("parallel.pp=2", "model.qk_norm=true", "training.z_loss=1e-3")
    result = start(config, *options)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "test"
    assert f"--logdir {tmp_path / 'runs'}" in result.stdout

    records = read_metrics(run)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert set(records[0]) == {"step", *TENSORBOARD_TAGS} - {"validation_loss", "validation_perplexity"} - GUIDED
    assert records[-1]["loss"] < records[0]["loss"] - 1.0
    assert records[-1]["perplexity"] == pytest.approx(math.exp(records[-1]["loss"]))
    uniform = 1e-3 * math.log(load_config(run / "config.yaml").model.vocab_size) ** 2  # of logits that are all 0
    assert records[0]["z_loss"] == pytest.approx(uniform, rel=0.1)
    assert records[-1]["tokens"] == 12 * 8 * 32
    assert records[-1]["skipped_documents"] == 3  # one empty document in each of three shards
    assert records[-1]["mfu"] is None  # nobody knows the peak of this CPU
    assert [record["step"] for record in records if "validation_loss" in record] == [6, 12]

    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert checkpoints == ["step_00000009", "step_00000012"]
    assert load_config(run / "config.yaml").parallel.pp == 2
    environment_file = json.loads((run / "environment.json").read_text())
    assert {"torch", "deepspeed", "python", "git_commit"} <= set(environment_file)
    _check_tensorboard(run, records)
    assert buffers_in_shared_memory() <= shared_memory, "something was left in /dev/shm"

    main([str(config), *options])
    assert "is finished: 12 steps are done" in capsys.readouterr().out

    generated = subprocess.run(
        [sys.executable, ROOT / "tools" / "generate.py", run, "--prompt", "the of", "--max-new-tokens", "8"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.startswith("the of") and len(generated.stdout.split()) > 3
    assert generated.stderr == ""


def _check_tensorboard(run: Path, records: list[dict]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run))
    board.Reload()
    unguided = [tag for key, tag in TENSORBOARD_TAGS.items() if key not in GUIDED]
    assert set(board.Tags()["scalars"]) == set(unguided) - {"3_speed/mfu"}
    events = {event.step: event.value for event in board.Scalars("1_loss/train")}
    assert events == {record["step"]: pytest.approx(record["loss"], rel=1e-6) for record in records}
    assert any("config.yaml" in tag for tag in board.Tags()["tensors"])


@pytest.mark.soak
def test_torchrun_gives_the_same_run(config: Path, tmp_path: Path) -> None:
    assert start(config, "run.name=alone", "training.num_steps=4").returncode == 0
    torchrun = ("--standalone", "--nproc-per-node", 2, "-m", "megastruct.train")
    result = start(*torchrun, config, "run.name=two", "training.num_steps=4", module="torch.distributed.run")
    assert result.returncode == 0, result.stderr
    alone, two = losses(tmp_path / "runs" / "alone"), losses(tmp_path / "runs" / "two")
    assert len(alone) == 4
    assert two == [(step, pytest.approx(loss, abs=1e-6)) for step, loss in alone]


@pytest.mark.parametrize("kind", [soak("tokens"), soak("text")])  # always: test_guided_run.py
def test_killed_and_resumed_is_the_undisturbed_run(config: Path, tmp_path: Path, corpus: Corpus, kind: str) -> None:
    """Bit for bit, killed three times: before the first checkpoint, between two, and about when one is written."""
    arguments = [config, "parallel.dp=2" if kind == "text" else "parallel.pp=2"]
    if kind == "text":
        arguments += ["data.kind=text", f"data.path={corpus.text}", f"data.tokenizer={corpus.tokenizer}"]
        arguments += ["data.validation_fraction=0.1", "evaluation.num_samples=4"]
    result = start(*arguments, "run.name=undisturbed")
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "killed"
    start_and_kill(run, 1, *arguments, "run.name=killed")
    start_and_kill(run, 5, *arguments, "run.name=killed")
    start_and_kill(run, 9, *arguments, "run.name=killed")
    result = start(*arguments, "run.name=killed")
    assert result.returncode == 0, result.stderr
    assert "resuming after step" in result.stdout
    assert losses(run) == losses(tmp_path / "runs" / "undisturbed")
    if kind == "text":
        assert read_metrics(run)[-1]["skipped_documents"] > 0
