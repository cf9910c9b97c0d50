"""Paths as users write them: in a config, an override, an option and a pattern."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from configs import tiny_config
from megastruct.commands import prepare
from megastruct.config.load import dump_config, load_config
from megastruct.errors import UserError
from megastruct.paths import expanded, option_path, paths_of_pattern
from megastruct.run.run_folder import RunFolder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "/scratch")
    monkeypatch.delenv("NOWHERE", raising=False)


def test_what_expands_and_what_does_not(tmp_path: Path) -> None:
    assert expanded("~/runs") == f"{tmp_path}/runs" and expanded("$PLACE/a${PLACE}b") == "/scratch/a/scratchb"
    for text in ("a b", "a/~", "5$", "$1", "s3://bucket/x", "[a]*.jsonl", "ORG/NAME", "a/"):
        assert expanded(text) == text
    for text, found in (("$NOWHERE/x", "the variable $NOWHERE is not set"), ("~nobody-here/x", "no home folder")):
        with pytest.raises(ValueError, match=found.replace("$", r"\$")):
            expanded(text)
        with pytest.raises(argparse.ArgumentTypeError, match="x"):
            option_path(text)


def test_the_paths_of_a_config(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {hidden_size: 32}")
    path = tmp_path / "config.yaml"
    path.write_text("include: $HOME/base.yaml\n" + dump_config(tiny_config()))
    data = "data.path=[{path: ~/a, weight: 1}, {path: $PLACE/b, weight: 1}]"
    config = load_config("~/config.yaml", ["run.folder=~/runs", "data.tokenizer=$PLACE/t.model", data])
    assert RunFolder(config).path == tmp_path / "runs" / "tiny" and config.data.tokenizer == "/scratch/t.model"
    assert [path for path, _ in config.data.sources] == [f"{tmp_path}/a", "/scratch/b"]
    with pytest.raises(UserError, match=r"run\.folder: .*the variable \$NOWHERE is not set"):
        load_config(path, ["run.folder=$NOWHERE"])


def test_the_paths_of_a_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--input", "~/text", "--output", "$PLACE/tokens", "--tokenizer", "~/t.model"]
    found = prepare.parse_arguments(words)
    assert found.output == Path("/scratch/tokens") and found.tokenizer == f"{tmp_path}/t.model"
    with pytest.raises(SystemExit) as exit_:
        prepare.parse_arguments([*words, "--output", "$NOWHERE"])
    assert exit_.value.code == 2 and "argument --output: '$NOWHERE': the variable" in capsys.readouterr().err


def test_a_folder_that_exists_is_never_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a[1]*" / "text"
    (folder / "more").mkdir(parents=True)
    files = [folder / "x.jsonl", folder / "more" / "y.jsonl"]
    for file in files:
        file.touch()
    assert paths_of_pattern(f"{folder}/*.jsonl") == files[:1]
    assert sorted(paths_of_pattern(f"{folder}/**/*.jsonl")) == sorted(files)
    monkeypatch.chdir(folder)
    assert paths_of_pattern("*.jsonl") == files[:1] and paths_of_pattern("m[aeiou]re/*.jsonl") == files[1:]
    assert paths_of_pattern(f"{tmp_path}/none/*") == []
