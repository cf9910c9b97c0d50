"""Tensor parallelism with pipelines, replicas and ZeRO: one process's run, for every structure.

Layer by layer it is proven in tests/tensor_parallel (float64, every gradient); here the whole engine is.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bounds import within
from configs import tiny_config
from marks import always, soak
from megastruct.config.schema import Config
from megastruct.engine.engine import build_engine
from megastruct.parallel.topology import Topology
from ranks import own_device, run_ranks
from runs import losses, resume_half_way, save_half_way, train_steps

BOUNDS = {"fp32": (1e-5, 3e-4), "bf16": (3e-2, 1e-1)}
FIRST_STEP = {"fp32": (1e-6, 1e-6), "bf16": (5e-3, 2e-2)}  # before Adam has magnified the last digits
# Where a gradient is nothing but rounding, Adam turns it into whole steps; a larger eps keeps that out.
OPTIMIZER = {"eps": 1e-5}
STRUCTURES: dict[str, dict[str, Any]] = {
    "dense": {"structure": "dense", "rank": None},
    "lowrank": {"structure": "lowrank", "rank": 8},
    "blockdense": {"structure": "blockdense", "rank": 8, "nblocks": 2},
    "blockshuffle": {"structure": "blockshuffle", "rank": None, "nblocks": 2},
}
LLAMA = {"activation": "swiglu", "norm": "rmsnorm", "bias": False, "tie_embeddings": False, "vocab_size": 62}
FEW_KV_HEADS = {"num_key_value_heads": 2, "vocab_size": 61}


def config_for(topology: Topology, zero: int = 1, structure: str = "lowrank", **sections: Any) -> Config:
    parallel = {"pp": topology.pp_size, "tp": topology.tp_size, "zero_stage": zero}
    # Few micro-batches: every one costs some hundred small collectives, slow where ranks share a core.
    sections["training"] = {"global_batch_size": 4, **sections.get("training", {})}
    sections["optimizer"] = {**OPTIMIZER, **sections.get("optimizer", {})}
    return tiny_config(parallel=parallel, ffn=STRUCTURES[structure], **sections)


@functools.cache
def losses_of_one_process(config: str) -> list[tuple[float, float]]:
    """Of a config as JSON; several layouts are compared with the same run."""
    return run_ranks(1, losses, Config.model_validate_json(config), Topology(1, 1))[0]


def compare(
    topology: Topology, zero: int = 1, precision: str = "fp32", structure: str = "lowrank", **sections: Any
) -> None:
    sections["training"] = {"precision": precision}
    alone = losses_of_one_process(config_for(Topology(1, 1), 1, structure, **sections).model_dump_json())
    results = run_ranks(topology.world_size, losses, config_for(topology, zero, structure, **sections), topology)
    assert all(result == results[0] for result in results), "ranks disagree"
    for step, ((loss, norm), (wanted, wanted_norm)) in enumerate(zip(results[0], alone, strict=True)):
        loss_bound, norm_bound = (BOUNDS if step else FIRST_STEP)[precision]
        assert within(abs(loss - wanted), loss_bound, "loss"), f"loss of step {step}"
        assert within(abs(norm - wanted_norm) / wanted_norm, norm_bound, "gradient norm"), (
            f"gradient norm of step {step}"
        )


@pytest.mark.parametrize("topology", [Topology(2, 1, 2), soak(Topology(1, 1, 2))], ids=str)
@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_every_structure(structure: str, topology: Topology) -> None:
    compare(topology, structure=structure)


@pytest.mark.parametrize("structure", always(sorted(STRUCTURES), []))
def test_more_ranks_than_blocks(structure: str) -> None:
    compare(Topology(1, 1, 4), structure=structure)


@pytest.mark.parametrize(
    ("topology", "zero"),
    [soak(Topology(2, 2, 2), 1), soak(Topology(2, 1, 2), 0), soak(Topology(1, 2, 2), 2), (Topology(1, 2, 2), 3)],
    ids=str,
)
def test_every_zero_stage(topology: Topology, zero: int) -> None:
    compare(topology, zero)


@pytest.mark.parametrize("topology", [Topology(1, 1, 2), soak(Topology(2, 2, 2))], ids=str)
def test_bf16(topology: Topology) -> None:
    compare(topology, precision="bf16")


@pytest.mark.parametrize("model", [soak(LLAMA), soak(FEW_KV_HEADS)], ids=["llama", "few_kv_heads"])
def test_model_variants(model: dict[str, Any]) -> None:
    """Gated FFN, untied head, a vocabulary that does not divide; key/value heads fewer than ranks."""
    compare(Topology(1, 1, 4), model=model)


def parameters_after(config: Config, topology: Topology, steps: int) -> dict[str, tuple[bool, torch.Tensor]]:
    """name -> (is it a part, this rank's weights) after `steps` steps; name.weight@start before the first."""
    engine = build_engine(config, topology, own_device())
    start = {name: p.detach().clone() for name, p in engine.named_parameters()}
    train_steps(engine, 0, steps)
    parts = {name: hasattr(p, "shard_spec") for name, p in engine.named_parameters()}
    assert all(getattr(p, "tensor_model_parallel", False) == parts[n] for n, p in engine.named_parameters())
    end = {name: (parts[name], p.detach().clone()) for name, p in engine.named_parameters()}
    return end | {f"{name}@start": (parts[name], tensor) for name, tensor in start.items()}


@pytest.mark.parametrize(("tp", "precision", "steps"), [(2, "bf16", 15), soak(4, "fp32", 50), soak(4, "bf16", 50)])
def test_replicated_parameters_stay_bit_equal(tp: int, precision: str, steps: int) -> None:
    topology = Topology(1, 1, tp)
    config = config_for(topology, structure="blockdense", training={"precision": precision, "num_steps": steps})
    ranks = run_ranks(tp, parameters_after, config, topology, steps)
    replicated = [name for name, (is_part, _) in ranks[0].items() if not is_part and not name.endswith("@start")]
    assert any("norm" in name for name in replicated) and any(name.endswith("fc1.v") for name in replicated)
    for name in replicated:
        assert all(torch.equal(rank[name][1], ranks[0][name][1]) for rank in ranks), name
        assert not torch.equal(ranks[0][name][1], ranks[0][f"{name}@start"][1]), f"{name} was not trained"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Topology(1, 1, 2), Topology(1, 1, 2)),
        soak(Topology(2, 1, 2), Topology(1, 1, 1)),
        (Topology(1, 2), Topology(1, 1, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("structure", ["blockdense", soak("blockshuffle")])
def test_resume_on_another_tp(tmp_path: Path, before: Topology, after: Topology, structure: str) -> None:
    run = {"run": {"folder": str(tmp_path)}, "model": FEW_KV_HEADS}
    config = config_for(before, structure=structure, **run)
    undisturbed = run_ranks(before.world_size, save_half_way, config, before, tmp_path)[0]
    config = config_for(after, structure=structure, **run)
    resumed = run_ranks(after.world_size, resume_half_way, config, after)[0]
    if before == after:
        assert resumed == undisturbed[10:]
    assert within(
        max(abs(a[0] - b[0]) for a, b in zip(resumed, undisturbed[10:], strict=True)), BOUNDS["fp32"][0], "loss"
    )


def initial_weights_of(configs: list[Config], topology: Topology) -> list[dict[str, torch.Tensor]]:
    return [initial_weights(config, topology) for config in configs]


def initial_weights(config: Config, topology: Topology) -> dict[str, torch.Tensor]:
    """The global weights that this rank's parts make, gathered over the tensor-parallel group."""
    engine = build_engine(config, topology, own_device())
    whole = {}
    for name, p in engine.named_parameters():
        spec = getattr(p, "shard_spec", None)
        parts: list[Any] = [None] * engine.tp.size
        if spec is not None:
            dist.all_gather_object(parts, p.detach(), group=engine.tp.group)
        whole[name] = p.detach() if spec is None else spec.unshard(parts)
    return whole


def test_initial_weights_do_not_depend_on_the_layout() -> None:
    def of(topology: Topology) -> list[Any]:
        configs = [config_for(topology, structure=structure, model=FEW_KV_HEADS) for structure in STRUCTURES]
        return run_ranks(topology.world_size, initial_weights_of, configs, topology)

    [all_alone], ranks = of(Topology(1, 1)), of(Topology(2, 1, 4))
    for alone, first_stage, last_stage in zip(all_alone, ranks[0], ranks[4], strict=True):
        together = first_stage | last_stage
        assert set(together) == set(alone)
        assert all(torch.equal(together[name], alone[name]) for name in alone)
