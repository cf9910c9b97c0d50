"""The project as a wheel: what is in it, and its commands, started from folders of a user."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from processes import ROOT, Corpus, copy_of_the_project, environment, losses

COMMANDS = (
    "train",
    "prepare",
    "plan",
    "inspect",
    "generate",
    "evaluate",
    "export",
    "import",
    "benchmark",
    "plot",
    "submit",
    "tokenizer",
)
COMMANDS += ("sample-corpus",)
COMMON_NAMES = ("tokenize", "inspect", "random", "queue", "profile", "token", "pickle", "numpy", "torch", "yaml")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = copy_of_the_project(tmp_path_factory.mktemp("source"))
    folder = tmp_path_factory.mktemp("wheel")
    build = [*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run(build, check=True, capture_output=True)
    [path] = folder.glob("*.whl")
    return path


class Installed:
    """The wheel in a folder of its own, beside the packages of this environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *command: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
        """A command of the wheel by its name, or any other by its path."""
        program = self.folder / "bin" / command[0]
        words = [program if program.exists() else command[0], *map(str, command[1:])]
        return subprocess.run(words, cwd=cwd, env=self.environment(), capture_output=True, text=True, timeout=300)

    def environment(self) -> Mapping[str, str]:
        return {**environment(), "PYTHONPATH": str(self.folder)}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", folder, wheel], check=True)
    return Installed(folder)


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    """A folder with files and folders that are named like modules."""
    folder = tmp_path / "user"
    for name in ("datasets", "megastruct/data", "megastruct/megastruct"):
        (folder / name).mkdir(parents=True)
    for name in (*COMMON_NAMES, "datasets/__init__"):
        (folder / f"{name}.py").write_text('raise SystemExit("a script of the user")\n')
    return folder


def test_the_wheel_holds_all_modules_and_configs(wheel: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "megastruct", "configs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [path for path in listed.stdout.splitlines() if (ROOT / path).exists()]
    assert any(path.endswith(".yaml") for path in paths) and any(path.endswith(".py") for path in paths)
    wanted = {path if path.startswith("megastruct/") else f"megastruct/{path}" for path in paths}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == wanted
        for path in paths:
            if path.endswith(".yaml"):
                assert archive.read(f"megastruct/{path}") == (ROOT / path).read_bytes()


def test_every_command_has_its_program(installed: Installed, tmp_path: Path) -> None:
    programs = {path.name for path in (installed.folder / "bin").iterdir()}
    assert programs == {f"megastruct-{command}" for command in COMMANDS}
    code = (
        "import importlib.metadata, megastruct\n"
        "points = importlib.metadata.distribution('megastruct').entry_points\n"
        "print(megastruct.__file__, sorted((point.name, point.load().__module__) for point in points), sep='\\n')"
    )
    result = installed.run(sys.executable, "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    file, points = result.stdout.splitlines()
    assert Path(file).is_relative_to(installed.folder)
    assert {name for name, _ in ast.literal_eval(points)} == programs


def test_the_commands_know_the_configs(installed: Installed, tmp_path: Path) -> None:
    """From a folder in which nothing is, the plan of a config by its path in the project."""
    arguments = ("configs/run/xl_lowrank_32.yaml", "parallel.pp=2", "--json")
    result = installed.run("megastruct-plan", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    here = subprocess.run(
        [sys.executable, ROOT / "tools" / "plan.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == here.stdout
    result = installed.run("megastruct-plan", "configs/run/xl_lowrnk_32.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert "No such file or directory\n    try: configs/run/xl_lowrank_32.yaml\n" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_of_train_names_the_command(installed: Installed, tmp_path: Path) -> None:
    result = installed.run("megastruct-train", "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: megastruct-train [-h]")


@pytest.mark.soak
def test_names_in_the_working_folder_shadow_no_module(
    installed: Installed, user_folder: Path, tmp_path: Path, config: Path, corpus: Corpus
) -> None:
    """Neither in a command nor in the processes that it starts: workers, launchers, ranks and their readers."""
    tokens = tmp_path / "tokens"
    arguments = ("--input", corpus.text, "--output", tokens, "--tokenizer", corpus.tokenizer, "--workers", 2)
    result = installed.run("megastruct-prepare", *arguments, "--validation-fraction", 0.1, cwd=user_folder)
    assert result.returncode == 0, result.stderr
    assert (tokens / "manifest.json").read_bytes() == (corpus.tokens / "manifest.json").read_bytes()

    text = ("data.kind=text", f"data.path={corpus.text}", f"data.tokenizer={corpus.tokenizer}")
    text += ("data.validation_fraction=0.1", "data.num_workers=1", "training.num_steps=2")
    result = installed.run("megastruct-train", config, *text, "run.name=command", cwd=user_folder)
    assert result.returncode == 0, result.stderr
    result = installed.run(sys.executable, "-m", "megastruct.train", config, *text, "run.name=alone", cwd=user_folder)
    assert result.returncode == 0, result.stderr
    runs = tmp_path / "runs"
    assert len(losses(runs / "command")) == 2 and losses(runs / "alone") == losses(runs / "command")
