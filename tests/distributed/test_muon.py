"""Muon, and the keys of groups of parameters, on every layout against a plain loop in one process (`plain_loop.py`).

And what a resume, a skipped step and guides do to Muon.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bounds import within
from configs import tiny_config
from guided import guided_config, interrupted_run, whole_run
from marks import always, soak
from megastruct.checkpoint.reading import SafeFileSystemReader
from megastruct.checkpoint.store import latest_checkpoint
from megastruct.config.schema import Config
from megastruct.engine.engine import build_engine
from megastruct.engine.zero import inner_optimizer
from megastruct.optimizers.ownership import Ownership
from megastruct.parallel.collectives import count_bytes
from megastruct.parallel.topology import Topology
from megastruct.planning.ownership import stage_ownership
from megastruct.planning.stages import pipeline_stages
from plain_loop import STEPS, plain_run
from ranks import own_device, run_ranks
from runs import Layout, OwnWeights, batches, learning_rate, own_weights, resume_half_way, save_half_way, whole_weights
from test_tensor_parallel import LLAMA, STRUCTURES

BOUNDS = {"fp32": (3e-6, 1e-5), "bf16": (3e-2, 1e-1)}  # losses; norms, relative
WEIGHTS = {"fp32": 2e-5, "bf16": 1e-1}
MUON: dict[str, Any] = {"kind": "muon", "eps": 1e-5}
# What groups of parameters may have of their own, large enough that a group without it would be seen.
OF_GROUPS = {
    "factor_learning_rate_scale": 0.5,
    "vocabulary_weight_decay": 1.0,
    "vocabulary_beta2": 0.9,
    "vector_beta2": 0.8,
}
KEYS: dict[str, dict[str, Any]] = {
    "muon": MUON,
    "muon_groups": {**MUON, **OF_GROUPS, "newton_schulz_coefficients": "polar_express"},
    "adamw_groups": {"kind": "adamw", "eps": 1e-5, **OF_GROUPS},
}
MODELS: dict[str, dict[str, Any]] = {
    "paper": {},
    "llama": LLAMA,
    "few_kv_heads": {"num_key_value_heads": 2, "vocab_size": 61},
    "base_width": {"base_width": 32},
    "qk_norm": {"qk_norm": True, "num_key_value_heads": 2, "base_width": 32},
}


@dataclass(frozen=True)
class Case(Layout):
    """A layout, and the model that it trains."""

    structure: str = "lowrank"
    precision: str = "fp32"
    model: str = "paper"
    keys: str = "muon"

    def config(self, **sections: Any) -> Config:
        batch = 2 * self.dp if self.dp > 2 else 4
        return tiny_config(
            parallel={"pp": self.pp, "tp": self.tp, "zero_stage": self.zero},
            ffn=STRUCTURES[self.structure],
            model=MODELS[self.model],
            training={"precision": self.precision, "global_batch_size": batch, "num_steps": STEPS},
            optimizer=KEYS[self.keys],
            **sections,
        )

    def __str__(self) -> str:
        return "-".join([super().__str__(), self.structure, self.precision, self.model, self.keys])


class Result(NamedTuple):
    """Of one rank: losses and norms, {name: (its part of the weight, spec, tensor-parallel rank)}, the plan, and the
    bytes that a step sent to owners and from them."""

    losses: list[tuple[float, float]]
    weights: OwnWeights
    plan: Ownership | None
    sent_bytes: int


def train(config: Config, topology: Topology) -> Result:
    engine = build_engine(config, topology, own_device())
    iterator = batches(config, topology) if engine.reads_data else None
    results, sent = [], 0
    for step in range(STEPS):
        engine.set_learning_rate(learning_rate(step))
        with count_bytes() as records:
            loss = engine.train_batch(iterator)
        results.append((loss, engine.gradient_norm()))
        sent += sum(size for name, size in records if name == "exchange")
    exchange: Any = getattr(inner_optimizer(engine.zero_optimizer), "exchange", None)
    return Result(results, own_weights(engine), exchange.ownership if exchange else None, sent // STEPS)


PLACES = [(1, 1, 1), (1, 2, 1), (1, 3, 1), (2, 1, 1), (1, 1, 2), (1, 2, 2), (2, 2, 1), (2, 1, 2), (2, 2, 2), (1, 1, 4)]
GRID = [
    Case(*place, zero, structure, precision)
    for precision in ("fp32", "bf16")
    for place in PLACES
    for zero in range(4)
    for structure in STRUCTURES
    if not (place[0] > 1 and zero > 1) and not (precision == "bf16" and zero == 0)
]
GRID += [Case(1, 2, 2, 1, "lowrank", "fp32", model) for model in ("llama", "few_kv_heads")]
GRID += [Case(1, 1, 4, 1, "lowrank", "fp32", "qk_norm"), Case(2, 2, 1, 0, "dense", "fp32", "qk_norm")]
GRID += [Case(1, 1, 4, 3, "blockdense", "fp32", "few_kv_heads"), Case(4, 1, 1, 0, "blockdense", "fp32", "base_width")]
GRID += [Case(1, 2, 2, 2, "blockdense", "fp32", "base_width"), Case(1, 2, 1, 1, "dense", "fp32", "llama")]
GROUPS = ("muon_groups", "adamw_groups")
GRID += [
    Case(*place, zero, "lowrank", precision, model, keys)
    for keys in GROUPS
    for place in [(1, 2, 1), (1, 1, 2), (1, 2, 2), (2, 2, 1), (2, 1, 2), (4, 1, 1)]
    for zero in range(4)
    for precision, model in [("fp32", "llama"), ("fp32", "base_width"), ("bf16", "paper")]
    if not (place[0] > 1 and zero > 1) and not (precision == "bf16" and zero == 0)
]
GRID += [Case(2, 1, 2, 1, "blockdense", "fp32", "llama", keys) for keys in GROUPS]
CHOSEN = [
    Case(1, 2, 1, 2, "lowrank", "fp32", "base_width", "muon_groups"),
    Case(2, 1, 2, 1, "blockdense", "fp32", "llama", "adamw_groups"),
    Case(2, 2, 1, 0, "lowrank"),
    Case(1, 3, 1, 1, "dense"),
    Case(2, 1, 2, 1, "blockshuffle"),
    Case(1, 2, 2, 1, "lowrank", "bf16"),
]


@pytest.mark.parametrize("case", always(GRID, CHOSEN), ids=str)
def test_every_layout_trains_as_a_plain_loop_does(case: Case) -> None:
    config = case.config()
    wanted, weights = plain_run(config)
    ranks = run_ranks(case.topology.world_size, train, config, case.topology)
    assert all(rank.losses == ranks[0].losses for rank in ranks), "ranks disagree"
    loss_bound, norm_bound = BOUNDS[case.precision]
    for step, ((loss, norm), (wanted_loss, wanted_norm)) in enumerate(zip(ranks[0].losses, wanted, strict=True)):
        assert within(abs(loss - wanted_loss), loss_bound, "loss"), f"loss of step {step}"
        assert within(abs(norm - wanted_norm) / wanted_norm, norm_bound, "gradient norm"), (
            f"gradient norm of step {step}"
        )
    found = whole_weights([rank.weights for rank in ranks])
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert within((found[name] - weight).abs().max(), WEIGHTS[case.precision], "weight"), name
    for rank, result in enumerate(ranks):  # owners and bytes are those of the plan
        planned = stage_ownership(config, pipeline_stages(config)[case.topology.pp_rank(rank)], case.dp)
        assert result.plan == planned
        stage_rank = rank % (case.dp * case.tp)
        assert result.sent_bytes == (4 * planned.sent_values()[stage_rank] if planned else 0)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Case(1, 2, 1, 3), Case(1, 2, 1, 3)),
        (Case(2, 1, 2, 1, "blockdense"), Case(1, 2, 1, 0, "blockdense")),
        (Case(1, 2, 1, 1, keys="muon_groups"), Case(1, 2, 1, 1, keys="muon_groups")),
        soak(Case(1, 2, 1, 3, keys="adamw_groups"), Case(1, 2, 1, 3, keys="adamw_groups")),
        soak(Case(2, 1, 2, 1, keys="muon_groups"), Case(1, 2, 1, 3, keys="muon_groups")),
        soak(Case(2, 2, 1, 0), Case(2, 2, 1, 0)),
        soak(Case(2, 1, 2, 1, precision="bf16"), Case(2, 1, 2, 1, precision="bf16")),
        soak(Case(1, 2, 1, 0, "blockdense"), Case(1, 1, 4, 3, "blockdense")),
        soak(Case(1, 2, 2, 3, "blockshuffle"), Case(4, 1, 1, 1, "blockshuffle")),
    ],
    ids=str,
)
def test_resume(tmp_path: Path, before: Case, after: Case) -> None:
    """Bit-equal on the same layout; on another one the losses go on within the bound."""
    run = {"run": {"name": "tiny", "folder": str(tmp_path)}}
    undisturbed = run_ranks(before.topology.world_size, save_half_way, before.config(**run), before.topology, tmp_path)
    latest = latest_checkpoint(tmp_path / "tiny" / "checkpoints")
    assert latest is not None
    kinds: dict[str, set[str]] = {}
    for name in SafeFileSystemReader(latest).read_metadata().state_dict_metadata:
        kind, _, parameter = name.partition(".")
        kinds.setdefault(parameter, set()).add(kind)
    moments = {"exp_avg", "exp_avg_sq"}
    of_matrices = moments if before.keys == "adamw_groups" else {"momentum"}
    assert kinds["blocks.1.attention.key.weight"] == kinds["blocks.1.mlp.fc1.u"] == {"master", *of_matrices}
    assert kinds["embedding.weight"] == kinds["final_norm.weight"] == {"master", *moments}
    resumed = run_ranks(after.topology.world_size, resume_half_way, after.config(**run), after.topology)
    assert all(result == resumed[0] for result in resumed), "ranks disagree"
    if before == after:
        assert resumed[0] == undisturbed[0][STEPS // 2 :]
    bound = BOUNDS[after.precision][0]
    assert within(
        max(abs(a[0] - b[0]) for a, b in zip(resumed[0], undisturbed[0][STEPS // 2 :], strict=True)), bound, "loss"
    )


@pytest.mark.parametrize(
    ("topology", "zero"), [soak(Topology(1, 2), 3), soak(Topology(2, 1, 2), 1), soak(Topology(2, 2), 0)], ids=str
)
def test_guides_train_and_leave(tmp_path: Path, topology: Topology, zero: int) -> None:
    """On a layout as on one process, through the end of the phase; and from a checkpoint just before it."""

    def config(place: Topology, zero: int, name: str) -> Config:
        return guided_config(place, zero, optimizer=MUON, run={"name": name, "folder": str(tmp_path)})

    alone = run_ranks(1, whole_run, config(Topology(1, 1), 1, "alone"), Topology(1, 1))[0]
    together = run_ranks(topology.world_size, whole_run, config(topology, zero, "together"), topology)
    assert all(result == together[0] for result in together), "ranks disagree"
    assert within(max(abs(a[0] - b[0]) for a, b in zip(together[0], alone, strict=True)), 1e-5, "loss")
    stopped = config(topology, zero, "stopped")
    first = run_ranks(topology.world_size, interrupted_run, stopped, topology, 9)[0]
    assert first + run_ranks(topology.world_size, whole_run, stopped, topology)[0] == together[0]
