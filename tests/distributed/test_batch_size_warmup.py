"""The batch size changes between steps: as engines of one batch size each compute it, on every kind of engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from configs import tiny_config
from marks import always
from megastruct.config.schema import Config
from megastruct.data.batch import Batch
from megastruct.data.order import deal
from megastruct.engine.engine import Engine, build_engine
from megastruct.parallel.topology import Topology
from megastruct.run.checkpoints import Checkpoints, load_checkpoint
from megastruct.run.run_folder import RunFolder
from ranks import own_device, run_ranks

STAGES = [
    {"batch_size": 4, "num_steps": 2},
    {"batch_size": 12, "num_steps": 3},
]  # 1 and 3 micro-batches of 2 on 2 ranks


def config_of(folder: Path, pp: int, tp: int, zero: int, precision: str, **training: Any) -> Config:
    training = {"precision": precision, "num_steps": 7, "batch_size_warmup": STAGES, **training}
    parallel = {"pp": pp, "tp": tp, "zero_stage": zero}
    return tiny_config(run={"folder": str(folder)}, training=training, parallel=parallel)


def batches(config: Config, topology: Topology, step: int, size: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(0, config.model.vocab_size, (size, config.training.seq_length + 1), generator=generator)
    for places in deal(0, size, config.training.micro_batch_size, topology.dp_rank(dist.get_rank()), topology.dp_size):
        yield Batch(rows[places, :-1], rows[places, 1:])


def train(engine: Engine, step: int, size: int) -> tuple[float, float]:
    engine.set_learning_rate(1e-2)
    loss = engine.train_batch(batches(engine.config, engine.topology, step, size) if engine.reads_data else None)
    return loss, engine.gradient_norm()


def warmed_up(config: Config, topology: Topology, resumed_at: int) -> list[tuple[float, float]]:
    """Train to the end; another engine takes over at step `resumed_at`."""
    engine, results, checkpoints = build_engine(config, topology, own_device()), [], Checkpoints(RunFolder(config))
    for step in range(config.training.base_steps):
        if step == resumed_at:
            checkpoints.save(engine, step, np.array([[step]]), {})
            load_checkpoint(engine := build_engine(config, topology, own_device(), step), checkpoints.newest())
        size = config.training.batch_sizes.at(step)
        engine.set_batch_size(size)
        results.append(train(engine, step, size))
    return results


def in_one_size_each(config: Config, topology: Topology) -> list[tuple[float, float]]:
    """An engine of a constant batch size for every stage, which goes on where the one before has ended."""
    results, checkpoints, newest = [], Checkpoints(RunFolder(config)), None
    sizes = config.training.batch_sizes
    ends = (*sizes.first_steps[1:], config.training.base_steps)
    for size, first, end in zip(sizes.sizes, sizes.first_steps, ends, strict=True):
        training = {**config.training.model_dump(), "batch_size_warmup": None, "global_batch_size": size}
        constant = Config.model_validate({**config.model_dump(), "training": training})
        load_checkpoint(engine := build_engine(constant, topology, own_device(), first), newest)
        results += [train(engine, step, size) for step in range(first, end)]
        newest = checkpoints.save(engine, end, np.array([[end]]), {})
    return results


LAYOUTS = [(2, 1, 1, 0, "fp32"), (1, 1, 2, 1, "bf16"), (1, 1, 2, 2, "fp32"), (1, 1, 2, 3, "bf16"), (2, 2, 2, 1, "fp32")]


@pytest.mark.parametrize(
    ("pp", "tp", "dp", "zero", "precision"), always(LAYOUTS, [(2, 1, 1, 0, "fp32"), (1, 1, 2, 2, "fp32")])
)
def test_every_stage_trains_as_an_engine_of_its_batch_size(
    tmp_path: Path, pp: int, tp: int, dp: int, zero: int, precision: str
) -> None:
    """Bit for bit, also resumed inside of a stage."""
    topology = Topology(pp, dp, tp)
    config = config_of(tmp_path / "a", pp, tp, zero, precision)
    warm = run_ranks(topology.world_size, warmed_up, config, topology, 3)
    apart = run_ranks(
        topology.world_size, in_one_size_each, config_of(tmp_path / "b", pp, tp, zero, precision), topology
    )
    assert all(result == apart[0] for result in [*warm, *apart])


def test_layouts_agree(tmp_path: Path) -> None:
    alone, two = [
        run_ranks(ranks, warmed_up, config_of(tmp_path / str(ranks), 1, tp, 1, "fp32"), Topology(1, 1, tp), -1)[0]
        for ranks, tp in ((1, 1), (2, 2))
    ]
    assert (
        max(abs(a - b) for one, other in zip(alone, two, strict=True) for a, b in zip(one, other, strict=True)) < 1e-5
    )
