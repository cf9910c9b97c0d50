"""Selective recomputation changes no bit of losses and gradient norms, and runs no collective again.

The reference is the same layout without recomputation. `tests/planning/test_plan_tensor_parallel.py` compares the bytes
that are sent with the plan, which counts those of the first forward only.
"""

from __future__ import annotations

import pytest

from configs import tiny_config
from guided import STRUCTURES
from marks import always
from megastruct.config.schema import Config
from megastruct.engine.engine import build_engine
from megastruct.parallel.topology import Topology
from ranks import own_device, run_ranks
from runs import Layout, batches, learning_rate

STEPS = 5
LAYOUTS = [
    Layout(1, 1, 1, 1),
    Layout(2, 1, 1, 1),
    Layout(2, 2, 1, 0),
    Layout(4, 1, 1, 1),
    Layout(1, 2, 1, 2),
    Layout(1, 1, 2, 1),
    Layout(1, 1, 2, 2),
    Layout(1, 2, 2, 2),
    Layout(2, 1, 2, 1),
    Layout(1, 1, 4, 2),
]
KINDS = ["plain", "guided", "separate", "bf16"]
ALWAYS = [
    (LAYOUTS[1], "lowrank", "separate"),
    (LAYOUTS[4], "blockdense", "plain"),
    (LAYOUTS[8], "blockshuffle", "guided"),
]


def trained(config: Config, topology: Topology) -> list[tuple[float, float]]:
    """(loss, gradient norm) of a few steps."""
    engine = build_engine(config, topology, own_device(), eod_id=0)
    iterator, results = batches(config, topology) if engine.reads_data else None, []
    for step in range(STEPS):
        engine.set_learning_rate(learning_rate(step))
        engine.set_alpha(0.5, step)
        results.append((engine.train_batch(iterator), engine.gradient_norm()))
    return results


def config_for(layout: Layout, structure: str, kind: str, recompute: bool | str) -> Config:
    training = {
        "activation_checkpointing": recompute,
        "precision": "bf16" if kind == "bf16" else "fp32",
        "document_attention": "separate" if kind == "separate" else "crossed",
        "global_batch_size": 8,
    }
    guided = {"schedule": "fixedstep" if kind == "guided" else "off", "levels": 2}
    parallel = {"pp": layout.pp, "tp": layout.tp, "zero_stage": layout.zero}
    return tiny_config(training=training, guided=guided, parallel=parallel, ffn=STRUCTURES[structure])


CASES = [
    (layout, structure, kind)
    for layout in LAYOUTS
    for structure, kind in zip(["blockdense", "blockshuffle", "lowrank", "lowrank"], KINDS, strict=True)
    if not (kind == "bf16" and layout.zero == 0)
]


@pytest.mark.parametrize(("layout", "structure", "kind"), always(CASES, ALWAYS), ids=str)
def test_selective_recomputation_changes_no_bit(layout: Layout, structure: str, kind: str) -> None:
    topology = layout.topology
    plain, selective = (
        run_ranks(topology.world_size, trained, config_for(layout, structure, kind, recompute), topology)
        for recompute in (False, "selective")
    )
    assert plain == selective
    assert plain[0][0][0] != plain[0][-1][0]  # it trains
