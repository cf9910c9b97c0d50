"""What ranks run in tests: a few training steps on a fixed stream of random tokens, cut as the loader cuts it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megastruct.config.schema import Config
from megastruct.data.batch import Batch
from megastruct.data.order import deal
from megastruct.engine.engine import Engine, build_engine
from megastruct.parallel.topology import Topology
from megastruct.run.checkpoints import Checkpoints, load_checkpoint
from megastruct.run.run_folder import RunFolder
from ranks import own_device


@dataclass(frozen=True)
class Layout:
    """Numbers of stages, replicas and tensor-parallel ranks, and the ZeRO stage."""

    pp: int
    dp: int
    tp: int
    zero: int

    @property
    def topology(self) -> Topology:
        return Topology(self.pp, self.dp, self.tp)

    def __str__(self) -> str:
        return f"pp{self.pp}dp{self.dp}tp{self.tp}zero{self.zero}"


OwnWeights = dict[str, tuple[Tensor, Any, int]]  # name -> (a rank's part of the weight, spec, tensor-parallel rank)


def batches(config: Config, topology: Topology, first_step: int = 0) -> Iterator[Batch]:
    training = config.training
    for step in range(first_step, training.base_steps):
        generator = torch.Generator().manual_seed(step)
        shape = (training.global_batch_size, training.seq_length + 1)
        rows = torch.randint(0, config.model.vocab_size, shape, generator=generator)
        replica = topology.dp_rank(dist.get_rank() if dist.is_initialized() else 0)
        for micro_batch in deal(0, training.global_batch_size, training.micro_batch_size, replica, topology.dp_size):
            yield Batch(rows[micro_batch, :-1], rows[micro_batch, 1:])


def learning_rate(step: int) -> float:
    return 1e-2 * (1 - step / 40)


def train_steps(engine: Engine, first_step: int, last_step: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the steps in [first_step, last_step)."""
    iterator = batches(engine.config, engine.topology, first_step) if engine.reads_data else None
    results = []
    for step in range(first_step, last_step):
        engine.set_learning_rate(learning_rate(step))
        loss = engine.train_batch(iterator)
        results.append((loss, engine.gradient_norm()))
    return results


def own_weights(engine: Engine) -> OwnWeights:
    weights = {}
    for name, p in engine.named_parameters():
        with engine.gathered([p]):
            weights[name] = (p.detach().float().cpu().clone(), getattr(p, "shard_spec", None), engine.tp.rank)
    return weights


def whole_weights(ranks: list[OwnWeights]) -> dict[str, Tensor]:
    """The global weights; every rank that has the same part of one has the same bits."""
    parts: dict[str, dict[int, tuple[Tensor, Any]]] = {}
    for weights in ranks:
        for name, (part, spec, tensor_rank) in weights.items():
            first, _ = parts.setdefault(name, {}).setdefault(0 if spec is None else tensor_rank, (part, spec))
            assert torch.equal(first, part), f"{name} differs between ranks"
    whole = {}
    for name, by_rank in parts.items():
        [spec] = {spec for _, spec in by_rank.values()}
        whole[name] = by_rank[0][0] if spec is None else spec.unshard([by_rank[r][0] for r in sorted(by_rank)])
    return whole


def losses(config: Config, topology: Topology) -> list[tuple[float, float]]:
    """Train the whole run."""
    return train_steps(build_engine(config, topology, own_device()), 0, config.training.base_steps)


def losses_and_evaluation(config: Config, topology: Topology) -> tuple[list[Any], float, list[Any]]:
    """Train half of the run, evaluate, train the other half."""
    engine = build_engine(config, topology, own_device())
    half = config.training.base_steps // 2
    first = train_steps(engine, 0, half)
    held_out = list(batches(config.model_copy(), topology, first_step=half))
    count = config.training.global_batch_size // (config.training.micro_batch_size * topology.dp_size)
    evaluated = engine.evaluate(held_out[:count], count)
    return first, evaluated, train_steps(engine, half, config.training.base_steps)


def save_half_way(config: Config, topology: Topology, folder: Path) -> list[tuple[float, float]]:
    """Train half of the run, save in the background, go on to the end."""
    import numpy as np

    checkpoints = Checkpoints(RunFolder(config))
    engine = build_engine(config, topology, own_device())
    half = config.training.base_steps // 2
    first = train_steps(engine, 0, half)
    checkpoints.start_save(engine, half, np.array([[half]]), {})
    second = train_steps(engine, half, config.training.base_steps)
    checkpoints.finish_save()
    return first + second


def resume_half_way(config: Config, topology: Topology) -> list[tuple[float, float]]:
    """Load what `save_half_way` saved and train to the end."""
    engine = build_engine(config, topology, own_device(), drawn=False)
    step, cursor, _ = load_checkpoint(engine, Checkpoints(RunFolder(config)).newest())
    assert cursor is not None and cursor.tolist() == [[step]]
    return train_steps(engine, step, config.training.base_steps)


def resume_and_save_again(config: Config, topology: Topology) -> list[tuple[float, float]]:
    """Load what `save_half_way` saved, save it as the step after, and train to the end."""
    checkpoints = Checkpoints(RunFolder(config))
    engine = build_engine(config, topology, own_device(), drawn=False)
    step, cursor, _ = load_checkpoint(engine, Checkpoints(RunFolder(config)).newest())
    assert cursor is not None
    checkpoints.save(engine, step + 1, cursor, {})
    return train_steps(engine, step, config.training.base_steps)


def evaluate_resumed(config: Config, topology: Topology) -> float:
    """Load what `save_half_way` saved; the loss of the first micro-batch that would be trained on."""
    engine = build_engine(config, topology, own_device(), drawn=False)
    step, _, _ = load_checkpoint(engine, Checkpoints(RunFolder(config)).newest())
    return engine.evaluate([next(batches(config, topology, first_step=step))], 1)
