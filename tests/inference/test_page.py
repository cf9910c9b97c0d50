"""The sections of docs/use_the_model.md on Python and generation: what they show is what works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import megastruct
from megastruct.commands import generate as generate_command
from trained import model_config, saved_run

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "use_the_model.md").read_text()


def text_of(section: str) -> str:
    [text] = re.findall(rf"^## {section}\n(.*?)(?=^## )", PAGE, re.DOTALL | re.MULTILINE)
    return text


def blocks(section: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text_of(section), re.DOTALL)


def test_python(tmp_path: Path) -> None:
    run = saved_run(model_config(tmp_path))
    layers, loading = blocks("In Python", "python")
    names: dict[str, Any] = {}
    exec(layers, names)
    torch.testing.assert_close(names["dense"](torch.ones(1, 768)), names["layer"](torch.ones(1, 768)))
    exec(loading.replace("runs/quickstart", str(run)), names)
    assert names["logits"].shape[1:] == (1, 330) and names["step"] == 20
    calls = re.findall(r"`(megastruct\.\w+\(768[^`]*\))`", text_of("In Python"))
    assert len(calls) == 3
    for call in calls:
        layer = eval(call, {"megastruct": megastruct})  # noqa: S307 - the page is the project's own
        assert layer(torch.ones(2, 768)).shape == (2, 3072)


def test_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = saved_run(model_config(tmp_path))
    [command] = blocks("Generate text", "bash")
    python, program, *arguments = shlex.split(command.replace("runs/quickstart", str(run)))
    assert (python, program) == (".venv/bin/python", "tools/generate.py")
    generate_command.main(arguments)
    assert capsys.readouterr().out.startswith("The file")
    options = set(re.findall(r"`(--[a-z-]+)", text_of("Generate text")))
    known = {option for action in generate_command._parser()._actions for option in action.option_strings}
    assert options <= known
