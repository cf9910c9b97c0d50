"""Learning rates by fan-in: every layout trains as one process does, and a resumed run goes on, with its many groups.

In a pipeline each stage has its own fan-ins, and so its own number of groups.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bounds import within
from marks import always, soak
from megastruct.config.schema import Config
from megastruct.engine.engine import build_engine
from megastruct.parallel.topology import Topology
from ranks import own_device, run_ranks
from runs import resume_half_way, save_half_way, train_steps
from test_tensor_parallel import BOUNDS, FIRST_STEP, LLAMA, STRUCTURES, config_for, initial_weights

MODEL = {"base_width": 32}


def config(topology: Topology, zero: int = 1, structure: str = "blockdense", **sections: Any) -> Config:
    return config_for(topology, zero, structure, model={**MODEL, **sections.pop("model", {})}, **sections)


def losses_and_groups(config: Config, topology: Topology) -> tuple[list[tuple[float, float]], list[dict[str, Any]]]:
    """The run's (loss, gradient norm) pairs, and this rank's parameter groups after it."""
    engine = build_engine(config, topology, own_device())
    results = train_steps(engine, 0, config.training.base_steps)
    keys = ("name", "lr_scale", "lr", "weight_decay")
    return results, [{key: group[key] for key in keys} for group in engine.deepspeed.optimizer.param_groups]


@pytest.mark.parametrize(
    ("topology", "zero", "precision"),
    [
        soak(Topology(1, 1, 2), 1, "fp32"),
        soak(Topology(2, 1, 2), 1, "fp32"),
        soak(Topology(4, 1), 1, "fp32"),
        (Topology(4, 1), 0, "fp32"),
        soak(Topology(1, 2, 2), 2, "fp32"),
        soak(Topology(1, 2, 2), 3, "fp32"),
        soak(Topology(2, 1, 2), 1, "bf16"),
        soak(Topology(1, 2), 3, "bf16"),
    ],
    ids=str,
)
def test_layouts(topology: Topology, zero: int, precision: str) -> None:
    training = {"precision": precision}
    [(alone, _)] = run_ranks(1, losses_and_groups, config(Topology(1, 1), training=training), Topology(1, 1))
    ranks = run_ranks(topology.world_size, losses_and_groups, config(topology, zero, training=training), topology)
    results = ranks[0][0]
    assert all(rank[0] == results for rank in ranks), "ranks disagree"
    for step, ((loss, norm), (wanted, wanted_norm)) in enumerate(zip(results, alone, strict=True)):
        loss_bound, norm_bound = (BOUNDS if step else FIRST_STEP)[precision]
        # The rates are up to four times higher here, and so is what bf16's rounding turns into; the mean stays close.
        wider = 2 if step and precision == "bf16" else 1
        assert within(abs(loss - wanted), wider * loss_bound, "loss"), f"loss of step {step}"
        assert within(abs(norm - wanted_norm) / wanted_norm, wider * norm_bound, "gradient norm"), (
            f"gradient norm of step {step}"
        )
    means = [sum(loss for loss, _ in run) / len(run) for run in (results, alone)]
    assert abs(means[0] - means[1]) <= BOUNDS[precision][0] / 3
    # The fan-ins: d = 16, f = 48, N/B = 8 and 24, R = 8; embedding and vectors stay at 1.
    assert {group["lr_scale"] for _, groups in ranks for group in groups} == {1.0, 32 / 16, 32 / 48, 32 / 8, 32 / 24}
    for group in (group for _, groups in ranks for group in groups):
        assert group["lr"] == 1e-2 * (1 - 19 / 40) * group["lr_scale"]
        decay = 0.0 if group["name"] == "vectors" else 0.1
        assert group["lr_scale"] * group["weight_decay"] == pytest.approx(decay)


def test_stages_have_different_numbers_of_groups() -> None:
    """Otherwise the test above would not see what is done about it."""
    ranks = run_ranks(4, losses_and_groups, config(Topology(4, 1)), Topology(4, 1))
    assert len({len(groups) for _, groups in ranks}) > 1


@pytest.mark.parametrize("structure", always(sorted(STRUCTURES), ["blockshuffle"]))
def test_every_structure_over_tensor_parallel_ranks(structure: str) -> None:
    one = config(Topology(1, 1), structure=structure)
    [(alone, _)] = run_ranks(1, losses_and_groups, one, Topology(1, 1))
    together, _ = run_ranks(2, losses_and_groups, config(Topology(1, 1, 2), structure=structure), Topology(1, 1, 2))[0]
    assert within(max(abs(a[0] - b[0]) for a, b in zip(together, alone, strict=True)), BOUNDS["fp32"][0], "loss")


@pytest.mark.parametrize(
    ("before", "zero_before", "after", "zero"),
    [
        soak(Topology(4, 1), 1, Topology(4, 1), 1),
        (Topology(2, 1, 2), 1, Topology(1, 2), 3),
        soak(Topology(1, 2), 2, Topology(1, 1, 2), 1),
        soak(Topology(1, 2), 3, Topology(2, 1), 0),
    ],
    ids=str,
)
def test_resume(tmp_path: Path, before: Topology, zero_before: int, after: Topology, zero: int) -> None:
    run = {"run": {"folder": str(tmp_path)}}
    first = config(before, zero_before, **run)
    undisturbed = run_ranks(before.world_size, save_half_way, first, before, tmp_path)[0]
    resumed = run_ranks(after.world_size, resume_half_way, config(after, zero, **run), after)[0]
    if before == after:
        assert resumed == undisturbed[10:]
    assert within(
        max(abs(a[0] - b[0]) for a, b in zip(resumed, undisturbed[10:], strict=True)), BOUNDS["fp32"][0], "loss"
    )


def test_untied_head_over_tensor_parallel_ranks() -> None:
    [(alone, _)] = run_ranks(1, losses_and_groups, config(Topology(1, 1), model=LLAMA), Topology(1, 1))
    together, _ = run_ranks(2, losses_and_groups, config(Topology(1, 1, 2), model=LLAMA), Topology(1, 1, 2))[0]
    assert within(max(abs(a[0] - b[0]) for a, b in zip(together, alone, strict=True)), BOUNDS["fp32"][0], "loss")


def test_initial_weights_do_not_depend_on_the_layout() -> None:
    for structure in STRUCTURES:
        alone = run_ranks(1, initial_weights, config(Topology(1, 1), structure=structure), Topology(1, 1))[0]
        topology = Topology(2, 1, 2)
        ranks = run_ranks(4, initial_weights, config(topology, structure=structure), topology)
        together = ranks[0] | ranks[2]
        assert set(together) == set(alone)
        assert all(torch.equal(together[name], alone[name]) for name in alone)
