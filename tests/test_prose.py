"""Prose is tested: the pages name only what exists, and show only what happens."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from megastruct.config.load import load_config
from megastruct.config.schema import Config
from megastruct.optimizers import OPTIMIZERS
from megastruct.start import main
from megastruct.structures import STRUCTURES, known_sizes

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MANUAL = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *MANUAL]


def shell_lines(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def links(page: Path) -> list[tuple[Path, str]]:
    """(file, anchor) of every link to a file of the project; the anchor is empty if there is none."""
    found = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text())
    return [((page.parent / target).resolve() if target else page, anchor) for target, anchor in found]


def headings(page: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)  # where a # is a comment
    return re.findall(r"^#+ (.*)$", prose, flags=re.M)


def anchor_of(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@functools.cache
def help_of(tool: str) -> str:
    """In this process, which has imported most of what the tools do."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [tool, "--help"])
        patch.setattr(sys, "path", list(sys.path))  # the tools put the checkout first
        runpy.run_path(str(ROOT / tool), run_name="__main__")
    assert not end.value.code
    return printed.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), target
        assert not anchor or anchor in map(anchor_of, headings(target)), f"{target}#{anchor}"
    for path in re.findall(r"`((?:megastruct|configs|tools|tests|docs)/[\w./-]*)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, to_read = {README}, [README]
    while to_read:
        new = {target for target, _ in links(to_read.pop()) if target.suffix == ".md"} - reached
        reached |= new
        to_read += new
    assert set(PAGES) - reached == set()


def test_pages_and_sections_that_the_code_names_exist() -> None:
    rooms = ("megastruct", "tools", "configs")
    files = [path for room in rooms for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".yaml")]
    assert files
    for path in files:
        for page, _, heading in re.findall(r'(docs/\w+\.md)(, "([^"]+)")?', path.read_text()):
            assert (ROOT / page).exists(), f"{path}: {page}"
            assert not heading or heading in headings(ROOT / page), f"{path}: {heading}"


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configs_with_their_overrides_load(page: Path) -> None:
    for line in shell_lines(page):
        words = [word for word in shlex.split(line) if not word.startswith("--")]
        for config in [word for word in words if word.startswith("configs/")]:
            load_config(ROOT / config, [word for word in words if re.match(r"[a-z]+\.[a-z_]+=", word)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M)
    named = re.findall(r"`make (\w+)`", page.read_text())
    named += [line.split()[1] for line in shell_lines(page) if line.startswith("make ")]
    assert set(named) <= set(targets)


def tabled_defaults() -> list[tuple[str, str, str]]:
    """(page, key, default) of every table of keys in the manual."""
    rows = []
    for page in MANUAL:
        for table in re.findall(
            r"^\| key \| default \| meaning \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", page.read_text(), re.M
        ):
            cells = [line.split("|") for line in table.splitlines()]
            rows += [(page.name, key.strip(" `"), default.strip()) for _, key, default, *_ in cells]
    return rows


def section(name: str) -> type[BaseModel]:
    model = Config.model_fields[name].annotation
    assert isinstance(model, type) and issubclass(model, BaseModel)
    return model


def default_of(key: str) -> str:
    """The default of `section.key` as the tables write it."""
    section_name, _, name = key.partition(".")
    if section_name == "ffn" and name in known_sizes():
        return "left out"
    fields = {field.alias or own: field for own, field in section(section_name).model_fields.items()}
    field = fields[name]
    if field.is_required():
        return "required"
    if field.default is None or field.default in ({}, ()):
        return "left out"
    if isinstance(field.default, tuple):
        return str([*field.default])
    if isinstance(field.default, bool | str):
        return str(field.default).lower()
    return f"{field.default:g}"


def test_defaults_in_the_tables_are_those_of_the_config() -> None:
    rows = tabled_defaults()
    pages = {"data.md", "guided.md", "optimizers.md", "performance.md", "reliability.md", "runs.md", "structures.md"}
    assert {page for page, *_ in rows} == pages
    assert {key: default for _, key, default in rows} == {key: default_of(key) for _, key, _ in rows}
    every = {
        f"{name}.{key}"
        for name in ("data", "ffn", "guided", "profiling", "reliability")
        for key in section(name).model_fields
    }
    every |= {f"ffn.{size}" for size in known_sizes()}
    assert every <= {key for _, key, _ in rows}, "a key is missing in its table"


def test_the_table_of_optimizers_is_the_registry() -> None:
    """Each key with the defaults of the optimizers that have it."""
    page = (ROOT / "docs" / "optimizers.md").read_text()
    rows = re.findall(r"^\| `optimizer\.(\w+)` \| ([^|]*) ?\| ([^|]+) \| ([^|]+) \|$", page, re.M)

    def default(kind: str, key: str) -> str:
        if key not in OPTIMIZERS[kind].keys:
            return ""
        value = OPTIMIZERS[kind].keys[key].default
        if value is None:
            return "left out"
        return str(value).lower() if isinstance(value, bool | str) else f"{value:g}"

    keys = {key for kind in ("adamw", "muon") for key in OPTIMIZERS[kind].keys}
    assert {key: (adamw.strip(), muon) for key, adamw, muon, _ in rows} == {
        key: (default("adamw", key), default("muon", key)) for key in keys
    }
    assert all(OPTIMIZERS["muon"].keys[key].description == text for key, _, _, text in rows)


def test_the_table_of_structures_is_the_registry() -> None:
    page = (ROOT / "docs" / "structures.md").read_text()
    for name, structure in STRUCTURES.items():
        numbers = structure.numbers
        [row] = re.findall(rf"^\| `{name}` \| (.*) \|$", page, re.M)
        formula, sizes, weights = row.split(" | ") if numbers.sizes else [*row.split(" | | ")[:1], "", row[-5:]]
        assert (formula, weights) == (numbers.formula, numbers.weights_formula)
        assert set(re.findall(r"`ffn\.(\w+)`", sizes)) == set(numbers.sizes)


def test_launch_options_of_the_readme_parse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    options = capsys.readouterr().out
    for line in shell_lines(README):
        if line.startswith("./launch.sh"):
            assert all(word in options for word in shlex.split(line) if word.startswith("--")), line


def test_the_message_that_the_readme_shows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shown = re.search(r"```\n\$ \./launch\.sh (.*?)\n(.*?)```", README.read_text(), re.S)
    assert shown
    command, message = shown.groups()
    with pytest.raises(SystemExit) as exit_:
        main(shlex.split(command))
    assert exit_.value.code == 2
    assert capsys.readouterr().err == message


def test_the_table_of_the_study_is_that_of_its_runs() -> None:
    """docs/guided.md against the records in docs/dynamics."""
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
