"""What the engine uses of DeepSpeed's internals exists in the installed release, and nothing else is used anywhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import deepspeed
import pytest

from megastruct.engine import internals
from megastruct.engine.internals import INTERNALS, Internal, check_internals, missing_internals
from megastruct.errors import UserError

PACKAGE = Path(internals.__file__).resolve().parents[1]
ENGINE = PACKAGE / "engine"


def test_the_installed_release_has_every_internal() -> None:
    assert missing_internals() == []


@pytest.mark.parametrize("internal", INTERNALS, ids=lambda internal: f"{internal.owner}: {internal.names[0]}")
def test_every_internal_in_the_table_is_used(internal: Internal) -> None:
    source = "\n".join(path.read_text() for path in ENGINE.glob("*.py") if path.name != "internals.py")
    for name in internal.names:
        assert re.search(rf"\b{re.escape(name)}\b", source), f"{name} is in the table and nowhere in engine/"


def test_a_release_without_one_is_named_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Internal("deepspeed.runtime.bf16_optimizer:BF16_Optimizer", ("update_all_weights",), "write the weights")
    no_class = Internal("deepspeed.runtime.bf16_optimizer:BF17_Optimizer", ("step",), "step in bf17")
    monkeypatch.setattr(internals, "INTERNALS", (gone, no_class))
    check_internals.cache_clear()
    with pytest.raises(UserError) as raised:
        check_internals()
    check_internals.cache_clear()
    assert f"DeepSpeed {deepspeed.__version__} has no update_all_weights in" in str(raised.value)
    assert "used to write the weights" in str(raised.value) and "used to step in bf17" in str(raised.value)
    assert f"pip install '{internals.SUPPORTED}'" in str(raised.value)


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    return names


def test_no_other_room_imports_deepspeed_or_touches_its_objects() -> None:
    """Elsewhere there is its launcher's command line, as words."""
    names = {name for internal in INTERNALS for name in internal.names if name.startswith(("_", "ds_", "fp32_", "hp_"))}
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(ENGINE):
            continue
        assert "deepspeed" not in imports_of(path), path
        attributes = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not attributes & names, path


def test_private_names_of_deepspeed_stand_in_the_table() -> None:
    """Every underscore attribute that engine/ touches of an object that is not its own."""
    table = {name for internal in INTERNALS for name in internal.names}
    for path in ENGINE.glob("*.py"):
        tree = ast.parse(path.read_text())
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            is_own = isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr in own
            of_torch = isinstance(node.value, ast.Attribute | ast.Name) and "torch" in ast.unparse(node.value)
            assert is_own or of_torch or node.attr in table, f"{path.name}:{node.lineno} {ast.unparse(node)}"
