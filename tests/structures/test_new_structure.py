"""A structure that the package does not have, registered from one folder beside this test, does all that others do.

It is configured, checked, planned, trained alone and over tensor-parallel ranks, guided, and merged to a dense matrix.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kronecker
from configs import tiny_config
from factors import check_against_reference, draw
from kronecker import maths
from megastruct.config.checks import cross_field_problems
from megastruct.config.load import dump_config, load_config
from megastruct.config.schema import Config
from megastruct.models.gpt import GPT
from megastruct.parallel.topology import Topology
from megastruct.planning.cost import ffn_parameters, forward_flops_per_token
from megastruct.planning.plan import make_plan, suggest
from megastruct.structures import STRUCTURES, Structure, register
from megastruct.structures.layers import Layers
from megastruct.structures.numbers import Numbers
from megastruct.structures.registry import _structures
from ranks import run_ranks
from runs import losses
from sharded import check_against
from test_sharded import check_bytes, linear_part, linear_reference

FFN = {"structure": "kronecker", "rank": None, "order": 4}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(kronecker.STRUCTURE)
    yield
    del _structures["kronecker"]


def config_with(**sections: Any) -> Config:
    return tiny_config(**{"ffn": FFN, **sections})


def test_mathematics() -> None:
    check_against_reference(maths, [draw(3, 12, seed=0), draw(5, 3, seed=1), draw(4, 4, seed=2), draw(20, seed=3)])


def test_config_with_its_size(tmp_path: Path) -> None:
    config = config_with()
    assert cross_field_problems(config) == [] and config.ffn.sizes == {"order": 4}
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("ffn", "tp", "where", "suggestion"),
    [
        ({"order": 5}, 1, "ffn.order", "ffn.order=4"),
        ({"order": None}, 1, "ffn.order", "ffn.order=4"),
        (
            {"rank": 8},
            1,
            "ffn.rank",
            "ffn.structure=lowrank, or ffn.structure=blockdense, or no ffn.rank (ffn.rank=null)",
        ),
        ({"structure": "kroneker"}, 1, "ffn.structure", "ffn.structure=kronecker"),
        (
            {"structure": "lowrank", "rank": 8},
            1,
            "ffn.order",
            "ffn.structure=kronecker, or no ffn.order (ffn.order=null)",
        ),
        ({"order": 16}, 2, "model.ffn_hidden_size", "model.ffn_hidden_size=32"),
    ],
)
def test_bad_sizes_are_refused(ffn: dict[str, Any], tp: int, where: str, suggestion: str) -> None:
    [problem] = cross_field_problems(config_with(ffn={**FFN, **ffn}, parallel={"tp": tp}))
    assert (problem.where, problem.suggestion) == (where, suggestion)


def test_plan_against_the_model_as_built() -> None:
    config = config_with()
    model = GPT(config)
    ffn = [m for block in model.blocks.children() for m in (block.mlp.fc1, block.mlp.fc2)]
    assert ffn_parameters(config) == sum(p.numel() for m in ffn for n, p in m.named_parameters() if n != "bias")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(2, config.training.seq_length, dtype=torch.int64))
    assert counter.get_total_flops() == forward_flops_per_token(config) * 2 * config.training.seq_length
    plan = make_plan(config_with(parallel={"tp": 2}), 4)
    assert plan["ffn"]["structure"] == "kronecker" and plan["ffn"]["order"] == 4
    assert plan["ffn_linear_bytes_per_token"] == {"fc1": 16 * 4 / 2, "fc2": 16 * 4 / 2}
    [suggested] = [row for row in suggest(config, 0.083) if row["structure"] == "kronecker"]
    assert suggested["order"] == 4


def parts(arguments: list[tuple[str, Any, int, int, bool]]) -> list[Any]:
    return [linear_part(*each) for each in arguments]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_layers_over_ranks_against_the_dense_equivalent(tp_size: int) -> None:
    """Output, all gradients, first weights and bytes, as for the structures of the package."""
    case = ("kronecker", {"order": 4})
    linears = [(form, case, n, m, True) for form in ("column", "row") for n, m in ((32, 64), (64, 32))]
    results = run_ranks(tp_size, parts, linears)
    for index, (form, _, n, m, _) in enumerate(linears):
        found = [result[index] for result in results]
        in_dim, out_dim = (0, -1) if form == "column" else (-1, 0)
        check_against(found, linear_reference(case, n, m, True), out_dim, in_dim)
        check_bytes(found, form, case, n, m, tp_size)


GUIDED = {"schedule": "fixedstep", "levels": 2}


@pytest.mark.parametrize("guided", [{}, GUIDED], ids=["alone", "guided"])
def test_training_over_two_ranks_is_training_on_one(guided: dict[str, Any]) -> None:
    training = {"num_steps": 6}
    alone = run_ranks(1, losses, config_with(training=training, guided=guided), Topology(1, 1, 1))[0]
    parallel = config_with(training=training, guided=guided, parallel={"tp": 2})
    shared = run_ranks(2, losses, parallel, Topology(1, 1, 2))[0]
    assert alone[-1][0] < alone[0][0] - 0.1
    assert torch.tensor(shared) == pytest.approx(torch.tensor(alone), rel=1e-4)


def test_merged_to_a_dense_layer() -> None:
    model = GPT(config_with())
    fc1 = model.get_submodule("blocks.1.mlp.fc1")
    x = torch.randn(3, 2, 16)
    torch.testing.assert_close(fc1(x), x @ fc1.to_dense().T + fc1.bias)


def test_what_an_entry_lacks_is_named_at_import(tmp_path: Path) -> None:
    """Each half: a class without a method, without an attribute, without its module; and a module without a form."""
    numbers = "from kronecker.numbers import KroneckerNumbers as K\nfrom megastruct.structures import *\n"
    layers = "import kronecker.layers as k\nfrom megastruct.structures.layers import Layers\n"
    half = "from megastruct.structures.numbers import Numbers\n"
    for text, said in (
        (f"{half}class Half(Numbers):\n  name = 'half'\nHalf()\n", "inner_width"),
        (f"{numbers}class C(K):\n  name = 'c'\ndel K.formula\nregister(Structure(C(), 'kronecker.layers'))", "formula"),
        (f"{numbers}register(Structure(K(), 'kronecker.absent'))", "there is no module kronecker.absent"),
        (f"{numbers}register(Structure(K(), 'absent.layers'))", "there is no module absent.layers"),
        (f"{numbers}register(Structure(K(), 'kronecker.numbers')); STRUCTURES['kronecker'].layers", "has no LAYERS"),
        (f"{layers}Layers(k.maths, k.KroneckerLinear, k.KroneckerColumnLinear)", "'row'"),
        (f"{layers}del k.maths.to_dense\nLayers(k.maths, *3 * [k.KroneckerLinear])", "lacks to_dense"),
    ):
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environment(tmp_path))
        assert done.returncode == 1 and "TypeError" in done.stderr and said in done.stderr, (text, done.stderr)
    with pytest.raises(ValueError, match="is registered already"):
        register(Structure(kronecker.KroneckerNumbers(), "kronecker.layers"))


def environment(folder: Path) -> dict[str, str]:
    import os

    root = Path(__file__).resolve().parents[2]
    return {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests' / 'structures'}:{folder}"}


def test_the_numbers_load_no_torch() -> None:
    program = "import sys, megastruct.structures, megastruct.planning.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    assert {type(structure.numbers).__mro__[1] for structure in STRUCTURES.values()} == {Numbers}
    assert all(isinstance(structure.layers, Layers) for structure in STRUCTURES.values())
