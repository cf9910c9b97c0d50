"""Weights & Biases for real, without its server: offline runs on the disk, a service that is not there or is killed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest

from configs import tiny_config
from megastruct.metrics import wandb_writer
from megastruct.metrics.wandb_writer import check_wandb, open_wandb
from megastruct.metrics.writers import MetricWriter

CONFIG = tiny_config(logging={"wandb_project": "project"})


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(wandb_writer, "_PATIENCE_SECONDS", 2)


def records_of(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_restart_continues_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    run.mkdir()
    for step, loss in ((1, 3.14159), (2, 2.71828)):
        writer = MetricWriter(run, step - 1, {}, open_wandb(CONFIG, run))
        writer.write(step, {"loss": loss, "validation_loss": None})
        writer.go_back(step)
        writer.close()
    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    number = json.loads((run / "wandb.json").read_text())["id"]
    assert [file.name for file in files] == [f"run-{number}.wandb"] * 2
    for file, loss in zip(files, (b"3.14159", b"2.71828"), strict=True):
        content = file.read_bytes()
        assert b"1_loss/train" in content and loss in content and b"hidden_size" in content
    assert records_of(run) == [3.14159, 2.71828]


@pytest.mark.parametrize("key", [None, "0" * 40])
def test_a_service_that_cannot_be_reached_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str | None
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    writer = MetricWriter(tmp_path, 0, {}, open_wandb(CONFIG, tmp_path))
    writer.write(1, {"loss": 3.0})
    writer.close()
    assert capsys.readouterr().err.count("the run goes on without Weights & Biases") == 1
    assert records_of(tmp_path) == [3.0]


def test_a_service_that_is_killed_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    writer = MetricWriter(tmp_path, 0, {}, open_wandb(CONFIG, tmp_path))
    writer.write(1, {"loss": 3.0})
    children = [child for child in psutil.Process().children(recursive=True) if "wandb" in child.name()]
    assert children
    for child in children:
        child.kill()
    for step in (2, 3):
        writer.write(step, {"loss": 3.0})
    writer.close()
    assert records_of(tmp_path) == [3.0] * 3
    assert capsys.readouterr().err.count("the run goes on without") == 1


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not list(check_wandb(CONFIG))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    [problem] = check_wandb(CONFIG)
    assert problem.where == "logging.wandb_project" and "megastruct[wandb]" in problem.suggestion
    assert not list(check_wandb(tiny_config()))
