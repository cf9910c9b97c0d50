"""What users get wrong: one message with the path and a way out, exit code 2, nothing started, nothing lost."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megastruct import start as start_module
from megastruct.start import main
from processes import Corpus, run_tool, start


def message(capsys: Any, *arguments: Any) -> str:
    """The message of a start that must fail before anything is started."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(start_module, "run_launcher", lambda *_: pytest.fail("processes were started"))
        main([str(argument) for argument in arguments])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")
    return captured.err


def test_many_mistakes_in_one_message(config: Path, capsys: Any) -> None:
    text = message(capsys, config, "model.hiden_size=3", "training.precison=bf16", "parallel.zero_stage=9")
    assert "3 problems" in text
    for part in ("model.hidden_size", "training.precision", "parallel.zero_stage: 9"):
        assert part in text


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["parallel.pp=2", "parallel.zero_stage=3"], ["parallel.zero_stage", "parallel.zero_stage=1"]),
        (["data.path=nowhere"], ["data.path", "nowhere"]),
        (["model.vocab_size=100"], ["model.vocab_size", "320"]),
        (["parallel.pp=2", "--num-gpus", "3"], ["parallel.pp", "3 processes", "pipelines of 2"]),
        (["parallel.dp=2", "--num-gpus", "3"], ["parallel.dp", "2 processes, 3 were started"]),
        (["--num-gpus", "3"], ["training.global_batch_size", "dp 3", "=12"]),
        (["evaluation.num_samples=8000"], ["evaluation.num_samples", "8000"]),
        (["--hostfile", "nowhere"], ["--hostfile", "slots"]),
        (["--num-gpus", "0"], ["--num-gpus", "less than 1"]),
        (["--node-rank", "1"], ["--node-rank", "without --hostfile"]),
        (["hardware.device=cuda"], ["hardware.device", "hardware.device=auto"]),
        (["run.folder=/dev/null/x"], ["run.folder", "run.folder=~/runs"]),
        (["run.folder=$NO_SUCH_VARIABLE/runs"], ["run.folder", "the variable $NO_SUCH_VARIABLE is not set"]),
        (["model.hidden_size=1000000000"], ["model.hidden_size", "more than any machine can hold"]),
        (["model.hidden_size=1000000"], ["memory: the model with its optimizer needs"]),
        (
            ["training.global_batch_size=4000000000000"],
            ["training.global_batch_size", "more than any machine can hold"],
        ),
        (["parallel.tp=3"], ["model.num_attention_heads", "training.seq_length=33", "model.ffn_hidden_size=63"]),
        (["--num-gpus", "3", "data.path=nowhere"], ["training.global_batch_size", "data.path"]),
    ],
)
def test_impossible_starts(config: Path, capsys: Any, overrides: list[str], parts: list[str]) -> None:
    text = message(capsys, config, *overrides)
    for part in parts:
        assert part in text


def test_no_such_config(tmp_path: Path, capsys: Any) -> None:
    assert str(tmp_path / "none.yaml") in message(capsys, tmp_path / "none.yaml")


def test_another_tokenizer(config: Path, tmp_path: Path, corpus: Corpus, capsys: Any) -> None:
    other = tmp_path / "other.model"
    run_tool("train_tokenizer.py", "--input", corpus.text, "--output", tmp_path / "other", "--vocab-size", 310)
    assert "data.tokenizer" in message(capsys, config, f"data.tokenizer={other}")


def test_text_mistakes(config: Path, tmp_path: Path, corpus: Corpus, capsys: Any) -> None:
    text = ["data.kind=text", f"data.tokenizer={corpus.tokenizer}"]
    assert "data.tokenizer" in message(capsys, config, "data.kind=text", f"data.path={corpus.text}")
    assert "data.path" in message(capsys, config, *text, f"data.path={tmp_path}/none-*.parquet")
    found = message(capsys, config, *text, f"data.path={corpus.text}", "data.text_column=txet")
    assert "data.text_column" in found and "content" in found
    found = message(capsys, config, *text, f"data.path={corpus.text}", "evaluation.num_samples=8000")
    assert "evaluation.num_samples: 8000 validation rows are requested" in found
    found = message(capsys, config, *text, f"data.path=[{{path: {corpus.text}, weight: 1}}, {{path: none, weight: 2}}]")
    assert "data.path.1" in found and "none" in found

    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"content": ["some text"] * 100}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.parquet").write_bytes(b"")
    found = message(capsys, config, *text, f"data.path={tmp_path}/*.parquet")
    assert str(tmp_path / "b.parquet") in found and str(tmp_path / "c.parquet") in found


def test_damaged_token_shards(config: Path, tmp_path: Path, corpus: Corpus, capsys: Any) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(corpus.tokens, copy)
    first = sorted((copy / "train").iterdir())[0]
    first.write_bytes(first.read_bytes()[:-2])
    assert str(first) in message(capsys, config, f"data.path={copy}")
    (copy / "manifest.json").write_text("{")
    assert "manifest.json" in message(capsys, config, f"data.path={copy}")


@pytest.mark.soak
def test_a_token_beyond_the_vocabulary_ends_the_run(config: Path, tmp_path: Path, corpus: Corpus) -> None:
    """Seen only when it is read: by the ranks, with the name of the file and without a traceback."""
    copy = tmp_path / "copy"
    shutil.copytree(corpus.tokens, copy)
    first = sorted((copy / "train").iterdir())[0]
    first.write_bytes(b"\xff\xff" * (first.stat().st_size // 2))
    result = start(config, f"data.path={copy}")
    assert result.returncode == 2
    assert str(first) in result.stderr and "65535" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_folder_of_another_config(config: Path, tmp_path: Path, capsys: Any) -> None:
    from megastruct.config.load import dump_config, load_config

    run = tmp_path / "runs" / "test"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(load_config(config)))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    text = message(capsys, config, "optimizer.learning_rate=0.5", "run.seed=3")
    assert text.splitlines() == [
        f"error: {run} holds a run of another config",
        "  run.seed: 3, but the run was started with 1234",
        "    at: the override run.seed=3",
        "  optimizer.learning_rate: 0.5, but the run was started with 0.01",
        "    at: the override optimizer.learning_rate=0.5",
        "  a run folder holds one run, which can be made longer",
        f"    try: run.name=test-2 for a new run, or run.name=test-2 run.from={run} for a branch of this one",
    ]
    assert (run / "metrics.jsonl").read_text() == json.dumps({"step": 1}) + "\n"


def test_hostfiles(config: Path, tmp_path: Path, capsys: Any) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=2\nnode2 slots=none\n")
    assert f"{hosts}:2" in message(capsys, config, "--hostfile", hosts)
    hosts.write_text("node1 slots=2\n# spare\nnode2 slots=1\n")
    assert "names 2 hosts" in message(capsys, config, "--hostfile", hosts, "--node-rank", 2, "--master-addr", "x")
    assert "--master-addr" in message(capsys, config, "--hostfile", hosts, "--node-rank", 1)
    hosts.write_text("-oProxyCommand=touch slots=2\n")  # ssh would take it for an option
    assert f"{hosts}:1" in message(capsys, config, "--hostfile", hosts)
    hosts.write_text("node1 slots=1\nnode1 slots=2\n")
    assert "node1 has a line already" in message(capsys, config, "--hostfile", hosts)
    hosts.write_text("me@node1 slots=1  # rack 3\nme@node2 slots=1 max_slots=4\n")
    found = message(capsys, config, "--hostfile", hosts, "--master-addr", "$(hostname)")
    assert "--master-addr: '$(hostname)' contains characters that a shell would interpret" in found
    hosts.write_text("node1 slots=2\n# spare\nnode2 slots=1\n")
    # all checks of a local start, for the processes of all nodes
    assert "micro_batch_size 2 x dp 3" in message(capsys, config, "--hostfile", hosts)
    assert "data.path" in message(capsys, config, "--hostfile", hosts, "data.path=nowhere")


def test_a_folder_in_use(config: Path, capsys: Any) -> None:
    from megastruct.config import load_config
    from megastruct.run.run_folder import RunFolder

    with RunFolder(load_config(config)).lock():
        assert "another process trains in" in message(capsys, config)


def test_a_folder_that_cannot_be_locked_is_not_in_use(
    config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    text = message(capsys, config)
    assert text.startswith("error: run.folder: ") and "output error" in text and str(tmp_path / "runs" / "test") in text


def test_divergence_ends_the_run_and_keeps_the_checkpoint(config: Path, tmp_path: Path) -> None:
    first = start(config, "training.num_steps=6", "optimizer.learning_rate=1e30", "schedule.warmup_fraction=0.0")
    assert first.returncode == 2 and "gradient norm" in first.stderr and "Traceback" not in first.stderr
    assert not list((tmp_path / "runs" / "test" / "checkpoints").glob("step_*6"))


@pytest.mark.soak
def test_a_damaged_checkpoint_is_named(config: Path, tmp_path: Path) -> None:
    assert start(config, "checkpoint.interval_steps=6").returncode == 0
    folder = tmp_path / "runs" / "test" / "checkpoints"
    shutil.rmtree(folder / "step_00000012")
    file = next((folder / "step_00000006").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:1000])
    result = start(config, "checkpoint.interval_steps=6")
    assert result.returncode == 2 and str(folder / "step_00000006") in result.stderr
    assert "Traceback" not in result.stderr
