"""The tutorials, block by block in a copy of the project: what they show is what works. Training is shortened.

Always: test_launch_script.py goes the same way, from text to generation, and test_prose.py checks every command's
files and options.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from processes import ROOT, copy_of_the_project, environment


def run_page(page: str, folder: Path, config: str, shorten: Callable[[str], str]) -> list[str]:
    """Run every block of a page in the copy `folder`, its YAML written to `config`; the outputs of the others."""
    (folder / ".venv").symlink_to(ROOT / ".venv")
    printed = []
    for kind, text in re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL):
        if kind == "yaml":
            (folder / config).write_text(shorten(text))
            continue
        program = [sys.executable, "-c", text] if kind == "python" else ["bash", "-euc", shorten(text)]
        done = subprocess.run(program, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        assert "Traceback" not in done.stderr
        printed.append(done.stdout)
    return printed


@pytest.mark.soak
def test_tutorial(tmp_path: Path) -> None:
    folder = copy_of_the_project(tmp_path)
    printed = run_page(
        "tutorial.md", folder, "my/model.yaml", lambda text: text.replace("num_steps: 200", "num_steps: 20")
    )
    assert len(printed) == 7
    assert printed[-1].startswith("The run") and len(printed[-1]) > len("The run\n")
    assert re.search(r"overall|tokens +loss", printed[-3])
    assert json.loads((folder / "my" / "exported" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= {p.name for p in (folder / "my/exported").iterdir()}
    assert (folder / "my" / "curves.png").stat().st_size > 10_000


@pytest.mark.soak
def test_first_day(tmp_path: Path) -> None:
    """A tenth of the steps."""

    def shorten(text: str) -> str:
        return re.sub(r"\b(20|40|80|120|160)\b", lambda match: str(int(match[0]) // 10), text)

    folder = copy_of_the_project(tmp_path)
    printed = run_page("first_day.md", folder, "first/run.yaml", shorten)
    assert "4 .jsonl.zst" in printed[2] and "text column 'body'" in printed[2]
    records = {
        name: [json.loads(line) for line in (folder / f"first/runs/{name}/metrics.jsonl").read_text().splitlines()]
        for name in ("stable", "decayed")
    }
    assert [max(record["step"] for record in records[name]) for name in ("stable", "decayed")] == [16, 4]
    assert len({record["learning_rate"] for record in records["stable"] if record["step"] > 2 if "loss" in record}) == 1
    origin = json.loads((folder / "first/runs/decayed/origin.json").read_text())
    assert origin["step"] == 8 and origin["folder"].endswith("first/runs/stable")
    assert {path.name for path in (folder / "first/runs/stable/checkpoints").glob("step_*")} >= {
        f"step_{step:08}" for step in (4, 8, 12, 16)
    }
    assert "step 8 of the run `stable`" in (folder / "first/exported/README.md").read_text()
    assert (folder / "first/exported/tokenizer.json").exists()
