"""What a device sends in one optimizer step, by kind of parallelism, from the config alone.

One function per kind; each returns bytes by purpose. Collectives are counted as rings: over D ranks, an all-reduce of
n bytes sends 2 (D - 1) / D n from each device, an all-gather or a reduce-scatter half of that.
Letters: P parameters of the stage, D replicas, m micro-batches per step, e bytes of a value.
"""

from __future__ import annotations

from megastruct.config.schema import Config
from megastruct.models.memory import value_bytes
from megastruct.models.stages import Stage


def traffic_bytes(config: Config, stage: Stage, dp_size: int) -> dict[str, dict[str, int]]:
    """Bytes that each device of a stage sends per step: {kind of parallelism: {purpose: bytes}}."""
    # Tensor parallelism belongs here: "tensor_parallel": tensor_parallel_bytes(config, stage).
    return {
        "data_parallel": data_parallel_bytes(config, stage.parameters, dp_size),
        "pipeline": pipeline_bytes(config, stage, dp_size),
    }


def data_parallel_bytes(config: Config, parameters: int, dp_size: int) -> dict[str, int]:
    """By ZeRO stage, gradients in fp32 on the wire:

    0: gradients all-reduced once. 1: the same, then the updated weights all-gathered. 2: as 1, but gradients are
    reduced in every micro-batch, as no device keeps them all. 3: weights gathered in every forward and every backward
    (once more for a forward that is run again), gradients reduce-scattered in every micro-batch, no gather at the end.
    DeepSpeed reduces by all-reduce up to stage 2 (`use_multi_rank_bucket_allreduce`), by reduce-scatter in stage 3.
    """
    zero = config.parallel.zero_stage
    micro_batches = micro_batches_per_step(config, dp_size)
    ring = (dp_size - 1) / dp_size
    gradients, weights = ring * 4 * parameters, ring * value_bytes(config) * parameters
    if zero == 3:
        gathers = 3 if config.training.activation_checkpointing else 2
        return {"gradients": round(micro_batches * gradients), "weights": round(micro_batches * gathers * weights)}
    times = micro_batches if zero == 2 else 1
    return {"gradients": round(times * 2 * gradients), "weights": round(weights) if zero else 0}


def pipeline_bytes(config: Config, stage: Stage, dp_size: int) -> dict[str, int]:
    """Per micro-batch one tensor of activations [s, b, h] forward over each border, and its gradient back.

    A tied head on another stage than the embedding sums its gradient with the embedding's: an all-reduce of two.
    """
    training, model, stages = config.training, config.model, config.parallel.pp
    border = training.micro_batch_size * training.seq_length * model.hidden_size * value_bytes(config)
    border *= micro_batches_per_step(config, dp_size)
    outer = stages > 1 and stage.index in (0, stages - 1)
    return {
        "activations": border if stage.index < stages - 1 else 0,
        "gradients": border if stage.index > 0 else 0,
        "tied_embedding": 4 * model.vocab_size * model.hidden_size if outer and model.tie_embeddings else 0,
    }


def micro_batches_per_step(config: Config, dp_size: int) -> int:
    return config.training.global_batch_size // (config.training.micro_batch_size * dp_size)
