"""The house: imports go down, never up or in rings; files and functions stay short."""

from __future__ import annotations

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megastruct"

# Rooms by floor. A room may import itself, the ground floor, and every floor below its own.
FLOORS: list[set[str]] = [
    {
        "errors",
        "console",
        "import_path",
        "paths",
        "files",
        "processes",
        "stops",
        "parallel",
        "structures",
        "optimizers",
        "config",
        "planning",
    },
    {"layers", "data", "checkpoint", "metrics", "launch", "profiling"},
    {"models"},
    {"engine"},
    {"run"},
    {"inference"},
    {"evaluation", "benchmarks", "huggingface"},
    {"train", "start", "torchrun", "commands"},
]
# Between rooms of the ground floor too, imports have one direction.
GROUND_ORDER = [
    "errors",
    "console",
    "import_path",
    "paths",
    "files",
    "processes",
    "stops",
    "parallel",
    "structures",
    "optimizers",
    "config",
    "planning",
]
MAX_FILE_LINES = 320
MAX_FUNCTION_LINES = 70


def floor_of(room: str) -> int:
    return next(index for index, rooms in enumerate(FLOORS) if room in rooms)


def python_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0] if len(parts) > 1 or parts[0] != "__init__" else ""


def top_level(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text()).body


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("megastruct.")}
    return rooms


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    room = room_of(path)
    if not room:  # the public interface names all rooms, and loads none before it is used
        [block] = [node for node in top_level(path) if isinstance(node, ast.If)]
        assert ast.unparse(block.test) == "TYPE_CHECKING"
        assert all(
            not ast.unparse(node).startswith(("from megastruct", "import megastruct")) for node in top_level(path)
        )
        return
    for other in imported_rooms(path) - {room}:
        if floor_of(room) == 0:
            assert GROUND_ORDER.index(other) < GROUND_ORDER.index(room), f"{room} imports {other}"
        else:
            assert floor_of(other) < floor_of(room), f"{room} imports {other}, which is not below it"


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(path) for path in python_files()} - {""}
    assert rooms <= set.union(*FLOORS)


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


def test_top_level_rooms() -> None:
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    allowed = {"megastruct", "configs", "tools", "tests", "docs", "shared"}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert {name for name in folders if not any(fnmatch(name, pattern) for pattern in ignored)} <= allowed
