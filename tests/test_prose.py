"""Prose is tested: what README and docs name exists, and what they show happens."""

from __future__ import annotations

import functools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megastruct.start import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shell_lines(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@functools.cache
def help_of(tool: str) -> str:
    command = [sys.executable, ROOT / tool, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:megastruct|configs|tools|tests|docs)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_files_and_options(page: Path) -> None:
    for line in shell_lines(page):
        words = shlex.split(line)
        for word in words:
            if re.fullmatch(r"(configs|tools)/[\w./-]+", word):
                assert (ROOT / word).exists(), line
        tool = next((word for word in words if word.startswith("tools/")), None)
        if tool:
            missing = [word for word in words if word.startswith("--") and word not in help_of(tool)]
            assert not missing, line


def test_launch_options_of_the_readme_parse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    options = capsys.readouterr().out
    for line in shell_lines(ROOT / "README.md"):
        if line.startswith("./launch.sh"):
            assert all(word in options for word in shlex.split(line) if word.startswith("--")), line


def test_the_message_that_the_readme_shows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command, _, message = re.search(
        r"```\n\$ \./launch\.sh (.*?)(\n)(.*?)```", (ROOT / "README.md").read_text(), re.S
    ).groups()
    with pytest.raises(SystemExit) as exit_:
        main(shlex.split(command))
    assert exit_.value.code == 2
    assert capsys.readouterr().err == message


def test_the_table_of_the_study_is_that_of_its_runs() -> None:
    """docs/guided.md beside the records in docs/dynamics."""
    page = (ROOT / "docs" / "guided.md").read_text()
    rows = re.findall(r"^\| (dense|rows|lowrank|coin) \|(.*)\|$", page, flags=re.M)
    said = {
        f"{name}_{seed}": float(value.strip(" *"))
        for name, cells in rows
        for seed, value in enumerate(cells.split("|"), 1)
        if value.strip()
    }
    records = {
        path.parent.name: json.loads(path.read_text().splitlines()[-1])
        for path in (ROOT / "docs" / "dynamics").glob("*/metrics.jsonl")
    }
    assert {run: record["step"] for run, record in records.items()} == dict.fromkeys(said, 1600)
    assert {run: round(record["validation_loss"], 3) for run, record in records.items()} == said


def test_every_dependency_has_its_reason() -> None:
    wanted = re.findall(r'"([A-Za-z-]+)>=', (ROOT / "setup.py").read_text())
    page = (ROOT / "docs" / "dependencies.md").read_text()
    pinned = (ROOT / "constraints.txt").read_text().lower()
    for name in wanted:
        assert f"| {name} |" in page, name
        assert re.search(rf"^{name.lower()}==", pinned, flags=re.M), name
