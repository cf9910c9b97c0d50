"""The baseline of the step benchmark trains alike on one process, with FSDP2, and with PyTorch's tensor parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from configs import tiny_config
from marks import soak
from megastruct.benchmarks.plain_training import PlainTraining, baseline_problems
from megastruct.config.schema import Config
from megastruct.parallel.topology import Topology
from ranks import own_device, run_ranks
from runs import batches

LLAMA = {"activation": "swiglu", "norm": "rmsnorm", "bias": False, "tie_embeddings": False, "num_key_value_heads": 2}
HEADS = {"qk_norm": True, "base_width": 8}
STEPS = 3


def config_of(model: dict[str, Any], tp: int) -> Config:
    ffn = {"structure": "dense", "rank": None}
    sizes, batch = {"num_layers": 2, **model}, {"num_steps": STEPS, "micro_batch_size": 4}
    return tiny_config(model=sizes, ffn=ffn, training=batch, parallel={"tp": tp})


def mean_losses(config: Config) -> list[float]:
    """The losses of steps on the same batch, the mean over the replicas."""
    training = PlainTraining(config, own_device())
    topology = Topology(1, training.replicas, config.parallel.tp)
    losses: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(losses, [training.train_batch(batches(config, topology)) for _ in range(STEPS)])
    return [sum(step) / len(step) for step in zip(*losses, strict=True)]


@pytest.mark.parametrize(
    "model, dp, tp",
    [
        ({}, 2, 1),
        ({}, 1, 2),
        soak(LLAMA, 2, 2),
        soak(LLAMA, 1, 2),
        soak(HEADS, 2, 1),
        soak(HEADS, 1, 2),
    ],
    ids=str,
)
def test_losses_are_those_of_one_process(model: dict[str, Any], dp: int, tp: int) -> None:
    alone = run_ranks(1, mean_losses, config_of(model, 1))[0]
    assert alone == sorted(alone, reverse=True) and alone[0] > alone[-1] + 0.05
    for losses in run_ranks(dp * tp, mean_losses, config_of(model, tp)):
        assert losses == pytest.approx(alone, abs=2e-6)


def test_what_has_no_baseline_is_said() -> None:
    config = config_of({"vocab_size": 63, "num_key_value_heads": 1}, 2)
    found = [str(problem) for problem in baseline_problems(config, 6)]
    assert "16 is not divisible by 3" in found[0] and "training.global_batch_size=48, or --no-baseline" in found[0]
    assert "model.vocab_size: 63" in found[1] and "model.num_key_value_heads: 1" in found[2]
    assert list(baseline_problems(config_of({}, 2), 4)) == []
