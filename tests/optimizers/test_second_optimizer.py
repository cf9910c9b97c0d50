"""An optimizer that the package does not have, registered beside this test, does all that AdamW does.

It is configured, checked, planned, trained, saved, resumed on another layout, and passes the end of the guided phase.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import tiny_config
from guided import whole_run
from marks import soak
from megastruct.checkpoint.reading import SafeFileSystemReader
from megastruct.checkpoint.store import latest_checkpoint
from megastruct.config.checks import cross_field_problems
from megastruct.config.load import dump_config, load_config
from megastruct.config.schema import Config
from megastruct.optimizers import OPTIMIZERS, register
from megastruct.optimizers.registry import _optimizers
from megastruct.parallel.topology import Topology
from megastruct.planning.memory import memory_by_part, optimizer_bytes
from megastruct.planning.stages import pipeline_stages
from ranks import run_ranks
from runs import losses, resume_half_way, save_half_way
from sgd import SGD

KIND = {"kind": "sgd", "learning_rate": 1e-2, "momentum": 0.8}


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    register(SGD())
    yield
    del _optimizers["sgd"]


def config_with(**sections: Any) -> Config:
    return tiny_config(**{"optimizer": KIND, **sections})


def test_config_with_its_key(tmp_path: Path) -> None:
    config = config_with()
    assert cross_field_problems(config) == [] and config.optimizer.settings == {"momentum": 0.8}
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert tiny_config(optimizer={"kind": "sgd", "learning_rate": 1.0}).optimizer.settings == {"momentum": 0.9}


@pytest.mark.parametrize(
    ("optimizer", "where", "suggestion"),
    [
        ({"kind": "sdg"}, "optimizer.kind", "optimizer.kind=sgd"),
        ({"momentum": 1.0}, "optimizer.momentum", "optimizer.momentum=0.9"),
        (
            {"beta1": 0.9},
            "optimizer.beta1",
            "optimizer.kind=adamw, or optimizer.kind=muon, or no optimizer.beta1 (optimizer.beta1=null)",
        ),
        ({"momentun": 0.9}, "optimizer.momentun", "optimizer.momentum"),
    ],
)
def test_bad_keys_are_refused(optimizer: dict[str, Any], where: str, suggestion: str) -> None:
    [problem] = [p for p in cross_field_problems(config_with(optimizer={**KIND, **optimizer})) if p.where == where]
    assert problem.suggestion == suggestion


def test_a_width_rule_that_is_not_known_is_refused() -> None:
    [problem] = cross_field_problems(config_with(model={"base_width": 16}))
    assert problem.where == "model.base_width" and "optimizer.kind=adamw" in problem.suggestion


@pytest.mark.parametrize(("zero_stage", "bytes_per_parameter"), [(0, 4), (1, 8 / 4), (3, 8 / 4)])
def test_plan(zero_stage: int, bytes_per_parameter: float) -> None:
    config = config_with(parallel={"zero_stage": zero_stage})
    [stage] = pipeline_stages(config)
    memory = memory_by_part(config, stage, dp_size=4)
    assert memory["optimizer"] == stage.parameters * bytes_per_parameter
    assert optimizer_bytes(tiny_config(parallel={"zero_stage": 0}), stage.parameters_by_role, 1) == 8 * stage.parameters


TRAINING = {"num_steps": 8}
SGD_RUN: dict[str, Any] = {"optimizer": KIND}
LAYOUTS = {
    "ZeRO 0": (Topology(1, 2), {"zero_stage": 0}, "fp32"),
    "ZeRO 1 bf16": (Topology(1, 2), {"zero_stage": 1}, "bf16"),
    "ZeRO 3": (Topology(1, 2), {"zero_stage": 3}, "fp32"),
    "tp 2": (Topology(1, 1, 2), {"tp": 2}, "fp32"),
}


@pytest.fixture(scope="module")
def alone(registered: None) -> list[tuple[float, float]]:
    """Losses and gradient norms of one process, which are not those of AdamW."""
    found, adamw = (run_ranks(1, losses, tiny_config(training=TRAINING, **o), Topology(1, 1))[0] for o in (SGD_RUN, {}))
    assert found[0] == adamw[0] and abs(found[-1][0] - adamw[-1][0]) > 1e-3
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_as_one_process_does(layout: str, alone: list[tuple[float, float]]) -> None:
    topology, parallel, precision = LAYOUTS[layout]
    config = config_with(training={**TRAINING, "precision": precision}, parallel=parallel)
    bound = 2e-2 if precision == "bf16" else 1e-5
    found = run_ranks(2, losses, config, topology)[0]
    assert torch.tensor(found)[:, 0].tolist() == pytest.approx(torch.tensor(alone)[:, 0].tolist(), abs=bound)


@pytest.mark.parametrize(("before", "after"), [("ZeRO 3", "tp 2"), soak("tp 2", "ZeRO 0")])
def test_resume_on_another_layout(tmp_path: Path, before: str, after: str) -> None:
    sections: dict[str, Any] = {"run": {"name": "tiny", "folder": str(tmp_path)}, "training": TRAINING}
    configs = [config_with(**sections, parallel=LAYOUTS[layout][1]) for layout in (before, after)]
    undisturbed = run_ranks(2, save_half_way, configs[0], LAYOUTS[before][0], tmp_path)[0]
    latest = latest_checkpoint(tmp_path / "tiny" / "checkpoints")
    assert latest is not None
    names = SafeFileSystemReader(latest).read_metadata().state_dict_metadata
    assert {name.partition(".")[0] for name in names} == {"master", "momentum_buffer"}
    resumed = run_ranks(2, resume_half_way, configs[1], LAYOUTS[after][0])[0]
    half = TRAINING["num_steps"] // 2
    assert torch.tensor(resumed)[:, 0].tolist() == pytest.approx(
        torch.tensor(undisturbed[half:])[:, 0].tolist(), abs=1e-5
    )


def resume_with_another_optimizer(config: Config) -> str:
    from megastruct.errors import UserError

    try:
        resume_half_way(config, Topology(1, 1))
    except UserError as error:
        return str(error)
    return ""


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"run": {"name": "tiny", "folder": str(tmp_path)}, "training": TRAINING}
    run_ranks(1, save_half_way, config_with(**sections), Topology(1, 1), tmp_path)
    [found] = run_ranks(1, resume_with_another_optimizer, tiny_config(**sections))
    assert "optimizer.kind: adamw, which keeps exp_avg, exp_avg_sq" in found
    assert "was written with sgd, which keeps momentum_buffer" in found


@pytest.mark.parametrize("zero_stage", [soak(0), 3])
def test_the_end_of_the_guided_phase(tmp_path: Path, zero_stage: int) -> None:
    """Losses go on as on one process; the guides leave after step 4."""
    sections: dict[str, Any] = {
        "guided": {"schedule": "fixedstep", "fraction": 0.5, "levels": 2},
        "training": TRAINING,
    }
    results = []
    for name, world, zero in (("alone", 1, 1), ("shared", 2, zero_stage)):
        run = {"name": name, "folder": str(tmp_path)}
        config = config_with(**sections, run=run, parallel={"zero_stage": zero})
        results.append(torch.tensor(run_ranks(world, whole_run, config, Topology(1, world))[0])[:, 0].tolist())
    assert len(results[0]) == 8 and results[1] == pytest.approx(results[0], abs=1e-5)


def test_records_that_contradict_themselves_are_refused() -> None:
    from megastruct.optimizers import Group, Key

    class Twice(SGD):
        name = "twice"
        groups = (Group("all", ("matrix", "vocabulary", "vector"), ("momentum_buffer",)), SGD.groups[1])

    class Nameless(SGD):
        name = "nameless"
        groups = (Group("all", ("matrix", "vocabulary", "vector"), ("master",)),)

    with pytest.raises(ValueError, match="2 groups for the role 'vector'"):
        register(Twice())
    with pytest.raises(ValueError, match="'master' cannot be the name"):
        register(Nameless())
    with pytest.raises(ValueError, match="'fast' is none of the choices"):
        Key("fast", "how it is computed", choices=("slow", "exact"))
    with pytest.raises(ValueError, match="is registered already"):
        register(SGD())
    assert "twice" not in OPTIMIZERS
