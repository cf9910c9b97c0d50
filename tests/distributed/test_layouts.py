"""Every layout trains as one process does: losses and gradient norms over 20 steps.

The bounds stand in docs/tolerances.md too. In bf16 a weight that rounds the other way once does so from then on: a
tied embedding's two gradients are summed in bf16 by one process and in fp32 over a pipeline, and clipping multiplies
all gradients by a norm whose last digit depends on the order of a sum. Without either, pipelines in bf16 are as close
as in fp32.
"""

from __future__ import annotations

from typing import Any

import pytest

from bounds import within
from configs import tiny_config
from marks import always, soak
from megastruct.config.schema import Config
from megastruct.parallel.topology import Topology
from ranks import run_ranks
from runs import losses, losses_and_evaluation

# Of losses, and of norms relative to the norm: at the first step, and after it, when rounding errors have grown.
FIRST = {"fp32": (1e-6, 1e-6), "bf16": (1e-3, 1e-3), "bf16 without tying and clipping": (1e-6, 1e-6)}
BOUNDS = {**FIRST, "fp32": (2e-6, 3e-5), "bf16": (1e-2, 2e-1)}
PIPELINES = [(pp, dp, zero) for pp in (1, 2, 4) for dp in (1, 2) for zero in (0, 1)]
PLAIN = [(1, dp, zero) for dp in (1, 2) for zero in (2, 3)]


def config_for(precision: str, pp: int, zero: int, **sections: Any) -> Config:
    sections["training"] = {"precision": precision, **sections.get("training", {})}
    return tiny_config(parallel={"pp": pp, "zero_stage": zero}, **sections)


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    """precision -> the (loss, norm) pairs of a single process."""
    return {
        precision: run_ranks(1, losses, config_for(precision, 1, 1), Topology(1, 1))[0]
        for precision in ("fp32", "bf16")
    }


def compare(results: list[Any], wanted: list[Any], what: str) -> None:
    assert all(result == results[0] for result in results), "ranks disagree"
    assert len(results[0]) == len(wanted) == 20
    for step, ((loss, norm), (wanted_loss, wanted_norm)) in enumerate(zip(results[0], wanted, strict=True)):
        loss_bound, norm_bound = (BOUNDS if step else FIRST)[what]
        assert within(abs(loss - wanted_loss), loss_bound, "loss"), f"loss of step {step}"
        assert within(abs(norm - wanted_norm) / wanted_norm, norm_bound, "gradient norm"), (
            f"gradient norm of step {step}"
        )


@pytest.mark.parametrize(
    ("pp", "dp", "zero"),
    always(
        [layout for layout in PIPELINES + PLAIN if layout != (1, 1, 1)],
        [(2, 2, 0), (4, 2, 1), (1, 2, 2), (1, 2, 3)],
    ),
)
def test_fp32(one_process: Any, pp: int, dp: int, zero: int) -> None:
    results = run_ranks(pp * dp, losses, config_for("fp32", pp, zero), Topology(pp, dp))
    compare(results, one_process["fp32"], "fp32")


@pytest.mark.parametrize(
    ("pp", "dp", "zero"),
    always([layout for layout in PIPELINES + PLAIN if layout[2] > 0], [(2, 2, 1)]),
)
def test_bf16(one_process: Any, pp: int, dp: int, zero: int) -> None:
    results = run_ranks(pp * dp, losses, config_for("bf16", pp, zero), Topology(pp, dp))
    compare(results, one_process["bf16"], "bf16")


@pytest.mark.parametrize(("pp", "dp"), [(2, 1), soak(4, 1), soak(2, 2)])
def test_bf16_without_tying_and_clipping_is_tight(pp: int, dp: int) -> None:
    plain = {"model": {"tie_embeddings": False}, "optimizer": {"gradient_clipping": 0.0}}
    alone = run_ranks(1, losses, config_for("bf16", 1, 1, **plain), Topology(1, 1))[0]
    results = run_ranks(pp * dp, losses, config_for("bf16", pp, 1, **plain), Topology(pp, dp))
    compare(results, alone, "bf16 without tying and clipping")


def test_losses_fall_and_differ_from_a_wrong_model(one_process: Any) -> None:
    """The comparison can fail: another seed is far outside of every bound."""
    other = run_ranks(1, losses, config_for("fp32", 1, 1, run={"seed": 5}), Topology(1, 1))[0]
    assert min(abs(a[0] - b[0]) for a, b in zip(other, one_process["fp32"], strict=True)) > 1e-3
    assert one_process["fp32"][-1][0] < one_process["fp32"][0][0] - 0.1


@pytest.mark.parametrize(("pp", "dp", "zero"), [(2, 1, 1), soak(1, 2, 2), soak(1, 1, 3)])
def test_recomputed_activations_change_nothing(one_process: Any, pp: int, dp: int, zero: int) -> None:
    config = config_for("fp32", pp, zero, training={"activation_checkpointing": True})
    compare(run_ranks(pp * dp, losses, config, Topology(pp, dp)), one_process["fp32"], "fp32")


@pytest.mark.parametrize(("pp", "dp", "zero"), [(2, 2, 1), soak(1, 2, 3)])
def test_evaluation_agrees_and_leaves_training_alone(one_process: Any, pp: int, dp: int, zero: int) -> None:
    alone = run_ranks(1, losses_and_evaluation, config_for("fp32", 1, 1), Topology(1, 1))[0]
    results = run_ranks(pp * dp, losses_and_evaluation, config_for("fp32", pp, zero), Topology(pp, dp))
    for first, evaluated, second in results:
        compare([first + second], one_process["fp32"], "fp32")
        assert within(abs(evaluated - alone[1]), BOUNDS["fp32"][0], "validation loss")


@pytest.mark.parametrize("clipping", [0.0, 0.05])
@pytest.mark.parametrize("zero", [soak(0), 1])
def test_clipping_counts_all_stages(clipping: float, zero: int) -> None:
    """Without ZeRO the norm is ours, with it DeepSpeed's; a pipeline and one process agree in both."""
    optimizer = {"gradient_clipping": clipping}
    alone = run_ranks(1, losses, config_for("fp32", 1, 1, optimizer=optimizer), Topology(1, 1))[0]
    results = run_ranks(2, losses, config_for("fp32", 2, zero, optimizer=optimizer), Topology(2, 1))
    compare(results, alone, "fp32")
