"""What a save and a load cost: host memory beside the training's own, and the time for which training stops.

`pytest -s` prints the numbers.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from configs import tiny_config
from host_memory import peak_extra_bytes
from marks import soak
from megastruct.config.schema import Config
from megastruct.engine.engine import build_engine
from megastruct.engine.state import saved_fragments
from megastruct.parallel.topology import Topology
from megastruct.run.checkpoints import Checkpoints, load_checkpoint
from megastruct.run.run_folder import RunFolder
from ranks import run_ranks

MIB = 2**20
BYTES_PER_ELEMENT = 12  # fp32 master and two moments
SLACK_BYTES = 160 * MIB  # two stored pieces of 64 MiB, and the metadata


@dataclass
class Costs:
    """Of one rank."""

    parameters: int
    own_elements: int
    save_bytes: int
    load_bytes: int
    blocking_seconds: float
    background_seconds: float
    synchronous_seconds: float


def config_for(folder: Path, precision: str, zero: int) -> Config:
    """50 million parameters."""
    model = {"hidden_size": 512, "num_layers": 12, "num_attention_heads": 8, "ffn_hidden_size": 2048}
    return tiny_config(
        run={"folder": str(folder)},
        model={**model, "vocab_size": 24576, "init_std": 0.02},
        ffn={"structure": "dense", "rank": None},
        training={"precision": precision},
        parallel={"zero_stage": zero},
    )


def measure(config: Config, topology: Topology) -> Costs:
    engine = build_engine(config, topology, torch.device("cpu"))
    own_elements = 0
    for fragment in saved_fragments(engine):
        own_elements += fragment.tensors["master"].numel()
        for tensor in fragment.tensors.values():
            tensor.normal_()  # so that every page of the moments is there before the measurement
    del fragment, tensor
    cursor = np.array([[0]])
    checkpoints = Checkpoints(RunFolder(engine.config))
    save_bytes = peak_extra_bytes(lambda: checkpoints.save(engine, 1, cursor, {}))
    blocking = background = synchronous = math.inf
    for step in (2, 4, 6):  # the best of three: the machine may have other work
        start = time.perf_counter()
        checkpoints.start_save(engine, step, cursor, {})
        blocking = min(blocking, time.perf_counter() - start)
        checkpoints.finish_save()
        background = min(background, time.perf_counter() - start)
        start = time.perf_counter()
        checkpoints.save(engine, step + 1, cursor, {})
        synchronous = min(synchronous, time.perf_counter() - start)
    load_bytes = peak_extra_bytes(lambda: load_checkpoint(engine, checkpoints.newest()))
    return Costs(
        sum(getattr(p, "ds_numel", p.numel()) for _, p in engine.named_parameters()),
        own_elements,
        save_bytes,
        load_bytes,
        blocking,
        background,
        synchronous,
    )


@pytest.mark.parametrize(("precision", "zero"), [soak("fp32", 1), soak("bf16", 3)])
def test_costs(tmp_path: Path, precision: str, zero: int) -> None:
    """A save needs a copy of what ZeRO gave the rank; a load nothing but, under ZeRO 1 and 2, what every optimizer step
    needs to gather the weights, too. Gathered, the state of the whole shard would be 605 MB for either.
    """
    weight_bytes = {1: 4, 3: 0}[zero]
    ranks = run_ranks(2, measure, config_for(tmp_path, precision, zero), Topology(1, 2))
    for rank, costs in enumerate(ranks):
        print(
            f"\n{precision} ZeRO {zero}, rank {rank}: {costs.parameters / 1e6:.1f} M parameters, "
            f"{costs.own_elements * BYTES_PER_ELEMENT / 1e6:.0f} MB of state on this rank; "
            f"extra for save {costs.save_bytes / 1e6:.0f} MB, for load {costs.load_bytes / 1e6:.0f} MB; "
            f"training stops for {costs.blocking_seconds:.2f} s, written after {costs.background_seconds:.2f} s; "
            f"a synchronous save {costs.synchronous_seconds:.2f} s"
        )
        assert 49e6 < costs.parameters < 52e6
        assert abs(costs.own_elements - costs.parameters / 2) < 0.01 * costs.parameters
        assert costs.save_bytes <= costs.own_elements * BYTES_PER_ELEMENT + SLACK_BYTES
        assert costs.load_bytes <= costs.parameters * weight_bytes + SLACK_BYTES
        assert costs.save_bytes >= costs.own_elements * BYTES_PER_ELEMENT, "the measurement misses the copy"
        assert costs.blocking_seconds < 0.5 * costs.synchronous_seconds
