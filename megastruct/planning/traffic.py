"""The bytes that a device sends in one optimizer step, by kind of parallelism, from the config alone.

One function per kind; each returns bytes by purpose. Collectives are counted as rings: over D ranks, an all-reduce of
n bytes sends 2 (D - 1) / D n from each device, an all-gather, a reduce-scatter or an all-to-all half of that.
Letters: P parameters of a device, D replicas, m micro-batches per step, e bytes of a value, d hidden size.
"""

from __future__ import annotations

from megastruct.config.schema import Config, FFNConfig
from megastruct.parallel.sizes import words_per_rank
from megastruct.planning.cost import ffn_linears, mean_guide_share
from megastruct.planning.memory import value_bytes
from megastruct.planning.ownership import whole_matrix_bytes
from megastruct.planning.stages import Stage


def traffic_bytes(config: Config, stage: Stage, dp_size: int) -> dict[str, dict[str, int]]:
    """Bytes that each device of a stage sends per step: {kind of parallelism: {purpose: bytes}}.

    "guides" is what self-guided training adds, averaged over its guided steps. "optimizer" is what the rank sends that
    sends most.
    """
    own, dp_guides = stage.parameters_per_device, 0
    if config.guided.schedule != "off":
        with_guides = own + stage.guide_weights // config.parallel.tp
        with_and_without = (sum(data_parallel_bytes(config, n, dp_size).values()) for n in (with_guides, own))
        dp_guides = next(with_and_without) - next(with_and_without)
    return {
        "tensor_parallel": tensor_parallel_bytes(config, stage, dp_size),
        "data_parallel": {**data_parallel_bytes(config, own, dp_size), "guides": dp_guides},
        "pipeline": pipeline_bytes(config, stage, dp_size),
        "optimizer": {"whole_matrices": whole_matrix_bytes(config, stage, dp_size)},
    }


def tensor_parallel_bytes(config: Config, stage: Stage, dp_size: int) -> dict[str, int]:
    """Bytes by purpose, as `parallel/collectives.py` counts them in all micro-batches of a step.

    attention: the input is gathered and the output reduce-scattered, d values per token each.
    ffn: the exchanges of its two `LinearMap`s.
    vocabulary: the embedding's output is reduce-scattered and the head's input gathered, d values per token each. The
    loss reduces three fp32 values per token in the forward, and nothing in the backward. For everything else, the
    backward sends as much as the forward.
    guides: those of self-guided training, which communicate like dense linears for the mean share of the tokens.
    replicated_gradients: an all-reduce of the gradients of replicated parameters. With ZeRO 0 and 1 it runs once a
    step, in fp32. With ZeRO 2 and 3, which keep no whole gradient, it runs in every micro-batch, and twice for the bias
    of a guided fc2, which both branches add.
    If everything is computed again, the collectives of the blocks' forward run again, except one that ends its map
    (that of a dense fc2), because the second forward stops when nothing more is needed.
    """
    training, tp, e = config.training, config.parallel.tp, value_bytes(config)
    micro_batches = micro_batches_per_step(config, dp_size)
    passes = 3 if training.activation_checkpointing is True else 2
    d, ffn, guides, guided_blocks = config.model.hidden_size, 0, 0.0, 0
    share = mean_guide_share(config) if config.guided.schedule != "off" else 0.0
    for index in stage.blocks:
        dense = config.ffn.of_block(index).is_dense
        for exchange in (linear.exchange(tp) for linear in ffn_linears(config, config.ffn.of_block(index))):
            ffn += exchange.width * (2 if exchange.ends_the_map else passes)
        guides += 0.0 if dense else share * passes * 2 * d
        guided_blocks += not dense and share > 0.0
    values_per_token = {
        "attention": passes * 2 * d * len(stage.blocks),
        "ffn": ffn,
        "guides": round(guides),
        "vocabulary": 2 * d * (stage.has_embedding + stage.has_head),
    }
    tokens = training.micro_batch_size * training.seq_length
    sent = {purpose: e * tokens * values for purpose, values in values_per_token.items()}
    sent["vocabulary"] += 2 * 4 * 3 * tokens * stage.has_head
    total = {purpose: micro_batches * num_bytes * (tp - 1) // tp for purpose, num_bytes in sent.items()}
    if config.parallel.zero_stage <= 1:
        total["replicated_gradients"] = 2 * 4 * stage.replicated_parameters * (tp - 1) // tp
    else:
        replicated = stage.replicated_parameters + d * config.model.bias * guided_blocks
        total["replicated_gradients"] = micro_batches * 2 * e * replicated * (tp - 1) // tp
    return total


def linear_bytes_per_token(config: Config, ffn: FFNConfig) -> dict[str, float]:
    """Bytes that a device sends per token in the forward of fc1 and of fc2; the backward sends as many."""
    tp, e = config.parallel.tp, value_bytes(config)
    fc1, fc2 = (e * linear.exchange(tp).width * (tp - 1) / tp for linear in ffn_linears(config, ffn))
    return {"fc1": fc1, "fc2": fc2}


def data_parallel_bytes(config: Config, parameters: int, dp_size: int) -> dict[str, int]:
    """Bytes by purpose for the ZeRO stage of the config; gradients are sent in fp32.

    0: gradients are all-reduced once. 1: the same, then the updated weights are all-gathered. 2: as 1, but gradients
    are reduced in every micro-batch, because no device keeps all of them. 3: weights are gathered in every forward and
    every backward (once more for a recomputed forward), gradients are reduce-scattered in every micro-batch, and
    nothing is gathered at the end. DeepSpeed reduces by all-reduce up to stage 2 (`use_multi_rank_bucket_allreduce`),
    by reduce-scatter in stage 3.
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
    """Bytes by purpose: activations, their gradients, and the gradient of a tied embedding.

    Per micro-batch, activations [s/tp, b, h] go forward over each border and their gradient goes back. If attention
    stays inside documents, the documents int32 [b, s] go forward as well. If a tied head is not on the embedding's
    stage, an all-reduce between the two stages sums their gradients.
    """
    training, model, stages, tp = config.training, config.model, config.parallel.pp, config.parallel.tp
    border = training.micro_batch_size * training.seq_length // tp * model.hidden_size * value_bytes(config)
    documents = 4 * training.micro_batch_size * training.seq_length if training.document_attention == "separate" else 0
    border, documents = (micro_batches_per_step(config, dp_size) * sent for sent in (border, documents))
    words = words_per_rank(model.vocab_size, tp)
    outer = stages > 1 and stage.index in (0, stages - 1)
    return {
        "activations": border + documents if stage.index < stages - 1 else 0,
        "gradients": border if stage.index > 0 else 0,
        "tied_embedding": 4 * words * model.hidden_size if outer and model.tie_embeddings else 0,
    }


def micro_batches_per_step(config: Config, dp_size: int) -> int:
    """Micro-batches of each replica in one optimizer step."""
    return config.training.global_batch_size // (config.training.micro_batch_size * dp_size)
