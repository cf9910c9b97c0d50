"""Attention inside of documents through real ranks: every layout trains and evaluates as one process does.

Behind the first stage of a pipeline the borders come with the activations; under tensor parallelism a rank has part of
the sequence between blocks and all of it in the attention. That one process is right is proven in
tests/models/test_documents.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask

from bounds import within
from configs import tiny_config
from guided import guided_config, steps
from marks import always, soak
from megastruct.config.schema import Config
from megastruct.engine.engine import build_engine
from megastruct.models import attention, walk
from megastruct.models.documents import attention_mask, block_mask
from megastruct.parallel.topology import Topology
from megastruct.planning.steps import total_steps
from ranks import ON_GPUS, own_device, run_ranks
from runs import batches, train_steps
from test_tensor_parallel import BOUNDS

EOD = 5
ALONE = Topology(1, 1)
MODEL = {"vocab_size": 8, "num_key_value_heads": 2}  # few words, so that one of the eight tokens of a row is EOD
LAYOUTS = [(Topology(2, 1), 1), (Topology(4, 1), 0), (Topology(1, 1, 2), 1), (Topology(2, 1, 2), 1)]
LAYOUTS += [(Topology(1, 2), 2), (Topology(1, 2), 3), (Topology(2, 2), 1)]


def config_for(topology: Topology, zero: int = 1, **training: Any) -> Config:
    training = {"global_batch_size": 8, "num_steps": 6, "document_attention": "separate", **training}
    parallel = {"pp": topology.pp_size, "tp": topology.tp_size, "zero_stage": zero}
    return tiny_config(parallel=parallel, model=MODEL, training=training, optimizer={"eps": 1e-5})


def losses_and_evaluation(config: Config, topology: Topology) -> list[float]:
    """The losses of all steps, the last one that of an evaluation."""
    engine = build_engine(config, topology, own_device(), eod_id=EOD)
    results = train_steps(engine, 0, config.training.base_steps)
    count = config.training.global_batch_size // (config.training.micro_batch_size * topology.dp_size)
    held_out = list(batches(config, topology, first_step=3))[:count]
    return [*(loss for loss, _ in results), engine.evaluate(held_out, count)]


def run(topology: Topology, zero: int = 1, **training: Any) -> list[float]:
    results = run_ranks(topology.world_size, losses_and_evaluation, config_for(topology, zero, **training), topology)
    assert all(result == results[0] for result in results), "ranks disagree"
    return results[0]


def furthest(results: list[float], wanted: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(results, wanted, strict=True))


@pytest.fixture(scope="module")
def alone() -> list[float]:
    return run(ALONE)


@pytest.mark.parametrize(
    ("topology", "zero"),
    always(LAYOUTS, [(Topology(4, 1), 0), (Topology(2, 1, 2), 1), (Topology(1, 2), 3)]),
    ids=str,
)
def test_every_layout_trains_as_one_process_does(alone: list[float], topology: Topology, zero: int) -> None:
    assert within(furthest(run(topology, zero), alone), BOUNDS["fp32"][0], "loss")


def test_crossed_attention_is_far_from_it(alone: list[float]) -> None:
    """The comparison can fail."""
    crossed = run(ALONE, document_attention="crossed")
    assert min(abs(a - b) for a, b in zip(crossed, alone, strict=True)) > 1e-3


@pytest.mark.parametrize(("topology", "zero"), [(Topology(2, 1, 2), 1), soak(Topology(1, 2), 3)], ids=str)
def test_recomputed_activations_change_nothing(alone: list[float], topology: Topology, zero: int) -> None:
    assert within(furthest(run(topology, zero, activation_checkpointing=True), alone), BOUNDS["fp32"][0], "loss")


def test_bf16() -> None:
    assert within(
        furthest(run(Topology(2, 1), precision="bf16"), run(ALONE, precision="bf16")), BOUNDS["bf16"][0], "loss"
    )


def losses_with_blocks(config: Config, topology: Topology) -> list[float]:
    """As `losses_and_evaluation`, with the mask that GPUs take and FlexAttention's reference of its kernel."""
    for room in (walk,):
        room.attention_mask = lambda documents, *_: block_mask(documents, 4)
    attention._compiled_flex_attention = lambda: flex_attention.flex_attention
    flex_attention._validate_device = lambda *_: None  # PyTorch keeps the reference's backward from CPUs
    return losses_and_evaluation(config, topology)


@pytest.mark.skipif(ON_GPUS, reason="test_kernel has the kernel itself")
@pytest.mark.parametrize(
    ("topology", "zero"), [soak(Topology(2, 1, 2), 1), soak(Topology(1, 2), 3), soak(Topology(1, 2), 2)], ids=str
)
@pytest.mark.parametrize("recompute", [False, soak(True)])
def test_mask_in_blocks(alone: list[float], topology: Topology, zero: int, recompute: bool) -> None:
    config = config_for(topology, zero, activation_checkpointing=recompute)
    for results in run_ranks(topology.world_size, losses_with_blocks, config, topology):
        assert within(furthest(results, alone), BOUNDS["fp32"][0], "loss")


@pytest.mark.skipif(not ON_GPUS, reason="the kernel runs on GPUs")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("topology", "zero"),
    [(Topology(2, 1), 1), (Topology(1, 1, 2), 1), (Topology(1, 2), 2), (Topology(1, 2), 3)],
    ids=str,
)
def test_kernel(monkeypatch: pytest.MonkeyPatch, topology: Topology, zero: int, recompute: bool) -> None:
    """Heads and rows that are large enough for FlexAttention's kernel."""
    monkeypatch.setitem(MODEL, "head_dim", 16)
    sizes = {"precision": "bf16", "seq_length": 256, "activation_checkpointing": recompute}
    assert attention_mask(torch.zeros(1, 256, device="cuda"), torch.bfloat16, 16).__class__ is BlockMask
    assert within(furthest(run(topology, zero, **sizes), run(ALONE, **sizes)), BOUNDS["bf16"][0], "loss")


def guided_run(config: Config, topology: Topology) -> list[float]:
    engine = build_engine(config, topology, own_device(), eod_id=EOD)
    engine, results = steps(engine, 0, total_steps(config))
    assert engine.guidance is None and engine.module.eod_id == EOD
    return [loss for loss, _ in results]


@pytest.mark.parametrize(("topology", "zero"), [(Topology(2, 1, 2), 1), soak(Topology(1, 2), 3)], ids=str)
def test_self_guided_training(tmp_path: Path, topology: Topology, zero: int) -> None:
    """Through the end of the guided phase, where the plain engine builds its model anew."""
    results = []
    for place, stage in ((ALONE, 1), (topology, zero)):
        folder = {"run": {"folder": str(tmp_path / str(place))}}
        training = {"num_steps": 6, "document_attention": "separate"}
        config = guided_config(place, stage, model=MODEL, training=training, **folder)
        results.append(run_ranks(place.world_size, guided_run, config, place)[0])
    assert within(furthest(results[1], results[0]), BOUNDS["fp32"][0], "loss")


def test_an_engine_wants_to_know_the_end_token() -> None:
    with pytest.raises(ValueError, match="end-of-document id"):
        build_engine(config_for(ALONE), ALONE, torch.device("cpu"))
