"""The recipes of docs/extending.md: the page shows these files as they are, and what they add works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_lowrank
from configs import tiny_config
from factors import check_against_reference, check_compiled, check_non_contiguous, draw
from megastruct.config.activations import ACTIVATIONS, register_activation
from megastruct.config.load import load_config
from megastruct.errors import UserError
from megastruct.models.gpt import GPT
from megastruct.parallel.topology import Topology
from megastruct.planning.cost import forward_flops_per_token
from megastruct.planning.memory import block_activation_bytes
from megastruct.planning.plan import make_plan
from megastruct.structures import register
from megastruct.structures.registry import _structures
from ranks import run_ranks
from runs import losses
from squared_relu import SQUARED_RELU

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^```python\n# (\S+)\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    register_activation(SQUARED_RELU)
    register(fused_lowrank.STRUCTURE)
    yield
    del ACTIVATIONS["relu2"], _structures["fused_lowrank"]


@pytest.mark.parametrize(
    ("name", "block"), BLOCKS, ids=[f"{i}-{Path(name).name}" for i, (name, _) in enumerate(BLOCKS)]
)
def test_the_page_shows_the_files_as_they_are(name: str, block: str) -> None:
    """A line `...` stands for lines that are left out."""
    text, at = (ROOT / name).read_text(), 0
    for part in (part.strip("\n") for part in re.split(r"^ *\.\.\.\n", block, flags=re.M)):
        assert part in text[at:], f"{name} does not hold, in this order:\n{part}"
        at += text[at:].index(part) + len(part)


def test_every_recipe_is_there() -> None:
    headings = re.findall(r"^## (.*)$", PAGE, re.M)
    assert headings == ["A structure", "A data source", "An optimizer", "A model variant", "A kernel"]
    assert len(BLOCKS) == 8


def test_a_structure_of_an_installed_package_is_found(tmp_path: Path) -> None:
    """By its entry point, in a program that does not name it."""
    info = tmp_path / "kron-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kron\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[megastruct.structures]\nkronecker = kronecker:STRUCTURE\n")
    program = "from megastruct.structures import STRUCTURES; print(*STRUCTURES)"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "structures", tmp_path)))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.stdout.split() == ["dense", "lowrank", "blockdense", "blockshuffle", "kronecker"], done.stderr


RELU2: dict[str, Any] = {"model": {"activation": "relu2"}}
QUICKSTART = ROOT / "configs" / "run" / "quickstart.yaml"


def test_the_activation_is_configured_planned_and_refused_when_misspelt() -> None:
    assert (
        make_plan(load_config(QUICKSTART, ["model.activation=relu2"]))["parameters"]
        == make_plan(load_config(QUICKSTART))["parameters"]
    )
    assert block_activation_bytes(tiny_config(**RELU2), tiny_config().ffn) > 0
    with pytest.raises(UserError, match=r"must be one of 'gelu', 'swiglu', 'relu2'\n.*\n +try: model.activation=relu2"):
        load_config(QUICKSTART, ["model.activation=relu3"])


def test_the_activation_is_what_the_model_computes() -> None:
    mlp = GPT(tiny_config(**RELU2)).get_submodule("blocks.0.mlp")
    x = torch.randn(3, 2, 16)
    torch.testing.assert_close(mlp(x), mlp.fc2(mlp.fc1(x).clamp(min=0) ** 2))


def test_the_activation_trains_over_two_ranks_as_on_one() -> None:
    training = {"num_steps": 4}
    alone = run_ranks(1, losses, tiny_config(**RELU2, training=training), Topology(1, 1, 1))[0]
    shared = run_ranks(2, losses, tiny_config(**RELU2, training=training, parallel={"tp": 2}), Topology(1, 1, 2))[0]
    assert torch.tensor(shared) == pytest.approx(torch.tensor(alone), rel=1e-4)


def test_the_kernel_against_the_reference() -> None:
    x, v, u, bias = draw(5, 3, 12, seed=0), draw(4, 12, seed=1), draw(10, 4, seed=2), draw(10, seed=3)
    check_against_reference(fused_lowrank, [x, v, u, bias])
    check_non_contiguous(fused_lowrank, x, v, u)
    check_compiled(fused_lowrank, [x, v, u, bias])
    low = fused_lowrank.apply(*(t.bfloat16() for t in (x, v, u, bias)))
    exact = fused_lowrank.apply(x, v, u, bias)
    assert low.dtype == torch.bfloat16 and (low.double() - exact).abs().max() <= 0.02 * exact.abs().max()


def test_the_kernel_trains_and_its_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    ffn, training = {"structure": "fused_lowrank", "rank": 8}, {"num_steps": 4}
    fused, plain = (
        run_ranks(1, losses, tiny_config(ffn=each, training=training), Topology(1, 1))[0] for each in (ffn, {})
    )
    assert torch.tensor(fused) == pytest.approx(torch.tensor(plain), rel=1e-5)
    config = tiny_config(ffn=ffn)
    model = GPT(config)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(2, config.training.seq_length, dtype=torch.int64))
    assert counter.get_total_flops() == forward_flops_per_token(config) * 2 * config.training.seq_length
