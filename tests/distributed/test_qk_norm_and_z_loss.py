"""`model.qk_norm` and `training.z_loss` together on every layout, against a plain model in float64 in one process.

The plain one has neither DeepSpeed nor the package's layers: it is that of tests/plain.py, with AdamW.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bounds import within
from configs import tiny_config
from marks import always, soak
from megastruct.config.schema import Config
from megastruct.engine.engine import build_engine
from megastruct.models.gpt import GPT
from megastruct.parallel.topology import Topology
from plain import plain_model
from ranks import ON_GPUS, own_device, run_ranks
from runs import (
    Layout,
    OwnWeights,
    batches,
    learning_rate,
    own_weights,
    resume_half_way,
    save_half_way,
    train_steps,
    whole_weights,
)
from test_tensor_parallel import LLAMA, STRUCTURES

STEPS = 10
Z_LOSS = 0.03  # its term is a third of the gradient, so that none of it can be missing
BOUNDS = {"fp32": (1e-5, 3e-4), "bf16": (5e-2, 3e-1)}  # losses and z terms; norms, relative
FIRST_STEP = {"fp32": (1e-6, 1e-5), "bf16": (5e-3, 2e-2)}
WEIGHTS = {"fp32": 5e-5, "bf16": 1e-1}
MODELS: dict[str, dict[str, Any]] = {
    "paper": {},
    "llama": LLAMA,
    "few_kv_heads": {"num_key_value_heads": 2, "vocab_size": 61, "head_dim": 6},
}


@dataclass(frozen=True)
class Case(Layout):
    """A layout, and the model that it trains."""

    precision: str = "fp32"
    model: str = "paper"
    structure: str = "lowrank"
    recompute: bool = False

    def config(self, **sections: Any) -> Config:
        return tiny_config(
            parallel={"pp": self.pp, "tp": self.tp, "zero_stage": self.zero},
            ffn=STRUCTURES[self.structure],
            model={"num_layers": 2, **MODELS[self.model], "qk_norm": True},
            training={
                "precision": self.precision,
                "global_batch_size": 4,
                "num_steps": STEPS,
                "z_loss": Z_LOSS,
                "activation_checkpointing": self.recompute,
            },
            optimizer={"eps": 1e-5},
            **sections,
        )

    def __str__(self) -> str:
        options = ["recompute"] * self.recompute
        return "-".join([super().__str__(), self.precision, self.model, self.structure, *options])


class Result(NamedTuple):
    """Of one rank: (loss, norm) of every step, the mean z term, the loss of an evaluation at the end, and weights."""

    losses: list[tuple[float, float]]
    z: float
    evaluated: float
    weights: OwnWeights


def train(config: Config, topology: Topology) -> Result:
    engine = build_engine(config, topology, own_device())
    losses = train_steps(engine, 0, STEPS)
    per_step = config.training.global_batch_size // (config.training.micro_batch_size * topology.dp_size)
    held_out = batches(config, topology)
    evaluated = engine.evaluate([next(held_out) for _ in range(per_step)], per_step)
    z = engine.loss.read_z(own_device())
    return Result(losses, z, evaluated, own_weights(engine))


def plain_terms(config: Config, weights: dict[str, Tensor], ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy, z term) of rows [b, s]."""
    logits = torch.stack([plain_model(config, weights, row) for row in ids])  # [b, s, v]
    picked = logits.gather(-1, labels[..., None])[..., 0]
    log_sum = logits.exp().sum(-1).log()
    return (log_sum - picked).mean(), Z_LOSS * (log_sum**2).mean()


@cache
def plain_run(model: str, structure: str) -> tuple[list[tuple[float, float]], float, float, dict[str, Tensor]]:
    """As `Result`, in float64 on one process: the gradient is that of the sum of both terms."""
    torch.set_num_threads(1)
    config = Case(1, 1, 1, 1, model=model, structure=structure).config()
    weights = {name: p.detach().double().requires_grad_() for name, p in GPT(config).named_parameters()}
    by_decay = [[p for p in weights.values() if (p.ndim > 1) == decays] for decays in (True, False)]
    groups = [{"params": ps, "weight_decay": decay} for ps, decay in zip(by_decay, (0.1, 0.0), strict=True)]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-5)
    stream, results, z_terms = batches(config, Topology(1, 1)), [], []
    for step in range(STEPS):
        pairs = [next(stream) for _ in range(2)]
        ids, labels = (torch.cat([getattr(pair, name) for pair in pairs]) for name in ("ids", "labels"))
        loss, z = plain_terms(config, weights, ids, labels)
        adamw.zero_grad()
        (loss + z).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in weights.values() if p.grad is not None))
        results.append((float(loss.detach()), norm))
        z_terms.append(float(z.detach()))
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step)
        for p in weights.values():
            assert p.grad is not None
            p.grad *= min(1.0, config.optimizer.gradient_clipping / (norm + 1e-6))
        adamw.step()
    held_out = batches(config, Topology(1, 1))
    pairs = [next(held_out) for _ in range(2)]
    with torch.no_grad():
        evaluated = [float(plain_terms(config, weights, pair.ids, pair.labels)[0]) for pair in pairs]
    last = {name: p.detach().float() for name, p in weights.items()}
    return results, sum(z_terms) / STEPS, sum(evaluated) / 2, last


PLACES = [(1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 1, 2), (1, 2, 2), (2, 2, 1), (2, 1, 2), (2, 2, 2), (1, 1, 4)]
GRID = [
    Case(*place, zero, precision, model)
    for precision in ("fp32", "bf16")
    for model in MODELS
    for place in PLACES
    for zero in range(4)
    if not (place[0] > 1 and zero > 1) and not (precision == "bf16" and zero == 0)
]
GRID += [Case(1, 1, 2, 2, structure=structure) for structure in STRUCTURES if structure != "lowrank"]
GRID += [Case(1, 2, 2, 3, recompute=True), Case(2, 1, 2, 1, "bf16", recompute=True)]
CHOSEN = [
    Case(2, 2, 1, 0),
    Case(2, 1, 2, 1, "fp32", "llama"),
    Case(1, 1, 4, 1, "fp32", "few_kv_heads"),
    Case(1, 2, 2, 3, "bf16", "few_kv_heads"),
]


@pytest.mark.parametrize("case", always(GRID, CHOSEN), ids=str)
def test_every_layout_trains_as_a_plain_loop_does(case: Case) -> None:
    """Losses and the evaluation are cross-entropy alone, norms and weights those of both terms."""
    wanted, z, evaluated, weights = plain_run(case.model, case.structure)
    ranks = run_ranks(case.topology.world_size, train, case.config(), case.topology)
    assert all(rank[:3] == ranks[0][:3] for rank in ranks), "ranks disagree"
    for step, ((loss, norm), (wanted_loss, wanted_norm)) in enumerate(zip(ranks[0].losses, wanted, strict=True)):
        loss_bound, norm_bound = (BOUNDS if step else FIRST_STEP)[case.precision]
        assert within(abs(loss - wanted_loss), loss_bound, "loss"), f"loss of step {step}"
        assert within(abs(norm - wanted_norm) / wanted_norm, norm_bound, "gradient norm"), (
            f"gradient norm of step {step}"
        )
    assert abs(ranks[0].z - z) <= loss_bound and abs(ranks[0].evaluated - evaluated) <= loss_bound
    found = whole_weights(
        [rank.weights for rank in ranks]
    )  # asserts that ranks with the same part of a weight have the same bits
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert within((found[name] - weight).abs().max(), WEIGHTS[case.precision], "weight"), name
        if name.endswith(("query_norm.weight", "key_norm.weight")):
            assert (found[name] - 1).abs().max() > 1e-3, f"{name} was not trained"


@pytest.mark.soak
def test_the_comparison_sees_a_missing_term() -> None:
    """Without z-loss or without norms, losses are far outside of the bounds."""
    wanted = plain_run("paper", "lowrank")[0]
    config = Case(1, 1, 1, 1).config()
    for section, key, off in (("training", "z_loss", 1e-12), ("model", "qk_norm", False)):
        values = config.model_dump()
        values[section][key] = off
        result = run_ranks(1, train, Config.model_validate(values), Topology(1, 1))[0]
        assert max(abs(a[0] - b[0]) for a, b in zip(result.losses, wanted, strict=True)) > 1e-2, key


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Case(1, 1, 2, 1, "fp32", "few_kv_heads"), Case(1, 2, 1, 3, "fp32", "few_kv_heads")),
        soak(Case(1, 1, 2, 1), Case(1, 1, 2, 1)),
        soak(Case(1, 2, 2, 3, "bf16", "llama"), Case(1, 2, 2, 3, "bf16", "llama")),
        soak(Case(2, 2, 1, 0), Case(1, 1, 4, 2)),
        soak(Case(1, 1, 4, 2, "fp32", "few_kv_heads"), Case(2, 1, 2, 1, "fp32", "few_kv_heads")),
    ],
    ids=str,
)
def test_resume(tmp_path: Path, before: Case, after: Case) -> None:
    """Bit-equal on the same layout; on another one the losses go on within the bound."""
    run = {"run": {"name": "tiny", "folder": str(tmp_path)}}
    undisturbed = run_ranks(before.topology.world_size, save_half_way, before.config(**run), before.topology, tmp_path)
    resumed = run_ranks(after.topology.world_size, resume_half_way, after.config(**run), after.topology)
    assert all(result == resumed[0] for result in resumed), "ranks disagree"
    if before == after and not ON_GPUS:
        assert resumed[0] == undisturbed[0][STEPS // 2 :]
    bound = BOUNDS[after.precision][0]
    assert within(
        max(abs(a[0] - b[0]) for a, b in zip(resumed[0], undisturbed[0][STEPS // 2 :], strict=True)), bound, "loss"
    )
