"""What lies in the working folder is imported neither by this package nor by what it starts."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

from megastruct.import_path import import_variables, import_variables_set

ROOT = Path(__file__).resolve().parent.parent

# As an editable install does it: setuptools puts such a finder behind that of the import path.
EDITABLE = f"""
import sys
from importlib.machinery import PathFinder

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        parent = name.rpartition(".")[0]
        if name == "megastruct" or parent == "megastruct":
            return PathFinder.find_spec(name, [{str(ROOT)!r} + "/" + parent])

sys.meta_path.insert(sys.meta_path.index(PathFinder) + 1, Finder)
"""


@pytest.fixture
def working_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "working"
    (folder / "megastruct" / "data").mkdir(parents=True)
    for name in ("argparse", "random", "queue", "numpy", "torch"):
        (folder / f"{name}.py").write_text("raise SystemExit(3)\n")
    return folder


@pytest.mark.parametrize(("module", "editable"), [("megastruct.start", True), ("megastruct.train", False)])
def test_modules_that_are_started_by_name(module: str, editable: bool, working_folder: Path, tmp_path: Path) -> None:
    """On the import path, and behind a finder, which comes after the mere folder `megastruct`."""
    (tmp_path / "sitecustomize.py").write_text(EDITABLE)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path if editable else ROOT)}
    environment.pop("PYTHONSAFEPATH", None)
    command = [sys.executable, "-m", module, "nowhere.yaml"]
    result = subprocess.run(command, cwd=working_folder, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "error: nowhere.yaml: No such file or directory\n")


def test_children_import_the_package_of_their_parent(working_folder: Path, tmp_path: Path) -> None:
    """Which was found in the folder where the parent started."""
    package = tmp_path / "checkout" / "megastruct"
    package.mkdir(parents=True)
    for name in ("__init__.py", "import_path.py"):
        shutil.copy(ROOT / "megastruct" / name, package)
    child = "import random, queue, megastruct; print(megastruct.__file__)"
    parent = (
        "import os, subprocess, sys\n"
        "from megastruct.import_path import import_variables\n"
        f"command, folder = [sys.executable, '-c', {child!r}], {str(working_folder)!r}\n"
        "subprocess.run(command, cwd=folder, env=os.environ | import_variables(), check=True)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "-c", parent]
    result = subprocess.run(command, cwd=package.parent, env=environment, capture_output=True, text=True)
    assert result.stdout == f"{package / '__init__.py'}\n", result.stderr


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, str(ROOT)),
        ("/x::/y", f"{ROOT}:/x:/y"),  # an empty entry is the working folder
        (f"/x:{ROOT}", f"/x:{ROOT}"),
    ],
)
def test_the_import_path_of_children(before: str | None, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if before is not None:
        monkeypatch.setenv("PYTHONPATH", before)
    assert import_variables() == {"PYTHONSAFEPATH": "1", "PYTHONPATH": after}


def test_an_installed_package_needs_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder must not come before the standard library."""
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(ROOT)])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with import_variables_set():
        assert os.environ["PYTHONSAFEPATH"] == "1" and "PYTHONPATH" not in os.environ
    assert "PYTHONSAFEPATH" not in os.environ


def test_the_tools_shadow_no_module() -> None:
    """tools/evaluate.py is not the package `evaluate`, which tasks of lm-evaluation-harness import."""
    tools = sorted((ROOT / "tools").glob("*.py"))
    [shared] = {re.search(r"^sys\.path\[:\] = .*$", tool.read_text(), re.M)[0] for tool in tools}
    assert shared
    script = "import runpy, sys; sys.path.insert(0, sys.argv[2]); runpy.run_path(sys.argv[1]); print(sys.path)"
    command = [sys.executable, "-c", script, str(ROOT / "tools" / "plan.py"), str(ROOT / "tools")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert str(ROOT / "tools") not in result.stdout and str(ROOT) in result.stdout
