"""docs/tutorial.md, block by block in a copy of the project: what it shows is what works. Training is shortened."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from processes import ROOT, copy_of_the_project, environment

PAGE = ROOT / "docs" / "tutorial.md"


def test_every_block(tmp_path: Path) -> None:
    folder = copy_of_the_project(tmp_path)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    printed = []
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "bash", "yaml", "bash", "bash", "bash", "bash", "python"]
    for kind, text in blocks:
        if kind == "yaml":
            (folder / "my" / "model.yaml").write_text(text.replace("num_steps: 200", "num_steps: 20"))
            continue
        program = [sys.executable, "-c", text] if kind == "python" else ["bash", "-euc", text]
        done = subprocess.run(program, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        assert "Traceback" not in done.stderr
        printed.append(done.stdout)
    assert printed[-1].startswith("The run") and len(printed[-1]) > len("The run\n")
    assert re.search(r"overall|tokens +loss", printed[-3])
    assert json.loads((folder / "my" / "exported" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= {p.name for p in (folder / "my/exported").iterdir()}
    assert (folder / "my" / "curves.png").stat().st_size > 10_000
