"""The benchmarks of inference, on a tiny model: every row that was asked for, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import megastruct
from configs import tiny_config
from megastruct.benchmarks import inference
from megastruct.commands import benchmark as command
from megastruct.config.load import dump_config
from megastruct.data.preparation.tokenizer import TRAINING_OPTIONS
from megastruct.huggingface.export import Trained, export
from tiny_data import train_model
from trained import model_config, saved_run


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(inference, "TIMED_SECONDS", 1e-3)
    dense = tiny_config(ffn={"structure": "dense", "rank": None})
    for name, config in (("dense", dense), ("lowrank", tiny_config())):
        (tmp_path / f"{name}.yaml").write_text(dump_config(config))
    return [str(tmp_path / "dense.yaml"), str(tmp_path / "lowrank.yaml")]


@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_rows(configs: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--new-tokens", "9"] if what == "decode" else []
    forms = ["--form", "structured", "--form", "auto"]
    command.main([what, *configs, *forms, *more, "--batches", "1,3", "--prompt-tokens", "6", "--dtype", "float32"])
    printed = capsys.readouterr().out
    assert [title for title in printed.splitlines() if ", " in title][-3:] == [
        "dense, structured",
        "lowrank, structured",
        "lowrank, auto",
    ]
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d,]+) +([\d.]+)$", printed, re.MULTILINE)
    assert [row[0] for row in rows] == ["1", "3"] * 3
    for batch, milliseconds, speed, _ in rows:
        tokens = int(batch) * (6 if what == "prefill" else 1)
        assert abs(tokens / (float(milliseconds) / 1e3) / float(speed.replace(",", "")) - 1) < 0.05
    assert rows[0][3] == rows[1][3] == "1.00"


def test_beside_transformers(tmp_path: Path, configs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    config = model_config(tmp_path, "dense")
    tokenizer = train_model(tmp_path / "tokenizer.model", vocab_size=330, **TRAINING_OPTIONS)
    loaded = megastruct.load(saved_run(config, tokenizer=tokenizer), "cpu")
    export(Trained(tmp_path, 20, loaded.model, loaded.tokenizer, config), tmp_path / "exported")
    arguments = ["decode", configs[0], "--new-tokens", "3", "--batches", "2", "--prompt-tokens", "6"]
    command.main([*arguments, "--dtype", "float32", "--transformers", str(tmp_path / "exported")])
    printed = capsys.readouterr().out
    assert len(re.findall(r"^ +2 +[\d.]+ +[\d,]+ +[\d.]+$", printed, re.MULTILINE)) == 2
    assert "exported, transformers" in printed
    with pytest.raises(SystemExit) as stopped:
        command.main([*arguments, "--transformers", str(tmp_path)])
    assert stopped.value.code == 2
    assert "--transformers" in capsys.readouterr().err


def test_a_step_is_averaged_over_the_continuation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time that grows with the length of the rows gives the time at the mean length of the continuation."""
    timed: list[int] = []

    def seconds(function: object, device: torch.device) -> float:
        timed.append(function.args[0])  # type: ignore[attr-defined]
        return float(function.args[0])  # type: ignore[attr-defined]

    monkeypatch.setattr(inference, "best_seconds", seconds)
    decoder = inference.Decoder(
        inference.random_model(tiny_config(), "merged", torch.device("cpu"), torch.float32), tiny_config()
    )
    found = inference.step_seconds(decoder, 2, prompt=100, new_tokens=80)
    assert timed == [110, 130, 150, 170]
    assert found == 140


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["decode", "--batches", "1,many"], "'many' is not a batch size"),
        (["prefill", "--batches", "largest"], "prefill has no largest"),
        (["decode", "--new-tokens", "0"], "--new-tokens: 0 is less than 1"),
        (["decode", "--device", "cuda:99"], "--device"),
    ],
)
def test_mistakes(configs: list[str], arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main([arguments[0], *configs, *arguments[1:]])
    assert stopped.value.code == 2
    assert wanted in capsys.readouterr().err
