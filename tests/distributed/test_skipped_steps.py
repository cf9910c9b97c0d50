"""A gradient that is not finite, on one rank, in one entry: no rank makes the step, and the next ones are as if it had
not been."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from configs import tiny_config
from marks import soak
from megastruct.config.schema import Config
from megastruct.engine.engine import Engine, build_engine
from megastruct.engine.state import fragments
from megastruct.engine.zero import inner_optimizer
from megastruct.parallel.topology import Topology
from ranks import own_device, run_ranks
from runs import batches

BAD_STEP, LAST_STEP = 2, 5
LAYOUTS = [  # precision, pp, dp, tp, zero, optimizer
    ("fp32", 1, 2, 1, 0, "adamw"),
    ("fp32", 2, 2, 1, 1, "adamw"),
    soak("fp32", 1, 1, 2, 1, "adamw"),
    soak("fp32", 1, 2, 1, 2, "adamw"),
    soak("fp32", 1, 2, 1, 3, "adamw"),
    soak("bf16", 2, 1, 2, 1, "adamw"),
    soak("bf16", 1, 2, 1, 2, "adamw"),
    ("bf16", 1, 2, 1, 3, "adamw"),
    ("fp32", 1, 2, 1, 0, "muon"),
    soak("fp32", 2, 2, 1, 1, "muon"),
    soak("bf16", 1, 2, 1, 3, "muon"),
]


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Masters, moments, AdamW's steps, and the weights that the forward uses."""
    owned = {f"{f.name}.{kind}": t.clone() for f in fragments(engine) for kind, t in f.tensors.items()}
    states = inner_optimizer(engine.zero_optimizer).state.values()
    steps = {f"step {i}": state["step"].clone() for i, state in enumerate(states) if "step" in state}
    weights = {f"weight {name}": getattr(p, "ds_tensor", p).detach().clone() for name, p in engine.named_parameters()}
    return owned | steps | weights


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train_with_a_bad_step(config: Config, topology: Topology, value: float | None) -> list[Any]:
    """(loss, norm) of each step and whether the bad one left all as it was; `value`: None leaves the step out."""
    engine = build_engine(config, topology, own_device())
    iterator = batches(config, topology) if engine.reads_data else None
    results: list[Any] = []
    for step in range(LAST_STEP):
        engine.set_learning_rate(1e-2)
        before = state_of(engine)
        if step == BAD_STEP and value is None:
            for _ in range(engine.deepspeed.gradient_accumulation_steps() if iterator else 0):
                next(iterator)
            continue
        handle = _spoil(engine, value) if step == BAD_STEP else None
        loss = engine.train_batch(iterator)
        if handle:
            handle.remove()
        results.append((loss, engine.gradient_norm(), equal(before, state_of(engine))))
    return results


def _spoil(engine: Engine, value: float) -> Any:
    """One entry of one gradient of the last rank: of a vector, which is in the group of few parameters, and under
    tensor parallelism of a part that this rank alone has."""
    if dist.get_rank() != dist.get_world_size() - 1:
        return None
    parts = [p for _, p in engine.named_parameters() if engine.tp.size == 1 or hasattr(p, "shard_spec")]
    parameter = [p for p in parts if len(getattr(p, "ds_shape", p.shape)) == 1][-1]

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    return parameter.register_hook(spoil)


@pytest.mark.parametrize(("precision", "pp", "dp", "tp", "zero", "kind"), LAYOUTS)
def test_a_bad_step_is_skipped_by_all(precision: str, pp: int, dp: int, tp: int, zero: int, kind: str) -> None:
    parallel = {"pp": pp, "tp": tp, "zero_stage": zero}
    config = tiny_config(training={"precision": precision}, parallel=parallel, optimizer={"kind": kind})
    topology = Topology(pp, dp, tp)
    value = math.nan if precision == "fp32" else math.inf
    results = run_ranks(pp * dp * tp, train_with_a_bad_step, config, topology, value)
    wanted = run_ranks(pp * dp * tp, train_with_a_bad_step, config, topology, None)
    for result, other in zip(results, wanted, strict=True):
        assert not math.isfinite(result[BAD_STEP][1])
        assert [same for _, _, same in result] == [step == BAD_STEP for step in range(LAST_STEP)]
        assert result[:BAD_STEP] + result[BAD_STEP + 1 :] == other, "later steps know of it"
