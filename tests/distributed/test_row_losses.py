"""The loss of each validation row, recorded on every layout, against a model in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from configs import tiny_config
from megastruct.config.schema import Config
from megastruct.engine.engine import build_engine
from megastruct.parallel.topology import Topology
from ranks import own_device, run_ranks
from runs import batches

# name -> (topology, overrides)
LAYOUTS: dict[str, tuple[Topology, dict[str, Any]]] = {
    "one": (Topology(1, 1), {}),
    "tp2_pp2": (Topology(2, 1, 2), {"parallel": {"tp": 2, "pp": 2}}),
    "dp2_zero3": (Topology(1, 2), {"parallel": {"zero_stage": 3}}),
    "tp2_zero2": (Topology(1, 1, 2), {"parallel": {"tp": 2, "zero_stage": 2}}),
}


def evaluate(config: Config, topology: Topology) -> tuple[float, float, list[Any], int]:
    """(loss, loss while rows are recorded, loss of each own row [micro-batches, b], this rank's replica)."""
    engine = build_engine(config, topology, own_device())
    count = config.training.global_batch_size // (config.training.micro_batch_size * topology.dp_size)
    held_out = list(batches(config, topology))[:count] if engine.reads_data else []
    plain = engine.evaluate(held_out, count)
    with engine.loss.recording() as rows:
        recorded = engine.evaluate(held_out, count)
    with engine.loss.recording(False) as none:
        engine.evaluate(held_out, count)
    assert none == []
    return plain, recorded, [row.tolist() for row in rows], topology.dp_rank(dist.get_rank())


def whole_model(config: Config) -> list[list[float]]:
    """The loss of each row of the first global batch, [micro-batches, b], from the logits of the engine's model."""
    engine = build_engine(config, Topology(1, 1), own_device())
    ids, labels = (torch.cat(part) for part in zip(*list(batches(config, Topology(1, 1)))[:8], strict=True))
    ids, labels = ids.to(own_device()), labels.to(own_device())
    x = engine.module(ids).double()  # [s, b, v]
    losses = F.cross_entropy(x.permute(1, 2, 0), labels, reduction="none").mean(1)
    return losses.view(-1, config.training.micro_batch_size).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_on_every_layout(layout: str) -> None:
    topology, sections = LAYOUTS[layout]
    [wanted] = run_ranks(1, whole_model, tiny_config())
    results = run_ranks(topology.world_size, evaluate, tiny_config(**sections), topology)
    holders = [rank for rank in range(topology.world_size) if topology.is_last_stage(rank)]
    for rank, (plain, recorded, rows, replica) in enumerate(results):
        assert recorded == plain
        if rank not in holders:
            assert rows == []
            continue
        own = wanted[replica :: topology.dp_size]
        assert torch.allclose(torch.tensor(rows), torch.tensor(own), rtol=1e-5, atol=1e-5)
    everything = torch.tensor([results[rank][2] for rank in holders])
    assert everything.mean() == pytest.approx(results[0][0], rel=1e-5)
