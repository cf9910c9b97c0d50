"""Memory of one device by part, from the config alone: formulas, nothing is built.

Letters: P parameters of the device's stage, D replicas, e bytes of a value (4 in fp32, 2 in bf16), d hidden size,
f FFN width, a attention width, kv width of keys and values, V vocabulary.

What is not counted: the device's context, workspaces, fragmentation, and what lives within one operator only.
Tensor parallelism is not counted either: the numbers are those of the unsharded stage.
"""

from __future__ import annotations

from megastruct.config.schema import Config, FFNConfig
from megastruct.models.stages import Stage
from megastruct.ops.cost import STRUCTURES

BUCKET_VALUES = 500_000_000  # DeepSpeed's reduce_bucket_size
LIVE_VALUES = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
PARTS = ("weights", "gradients", "optimizer", "communication", "activations", "logits")


def value_bytes(config: Config) -> int:
    return 2 if config.training.precision == "bf16" else 4


def memory_bytes(config: Config, stage: Stage, dp_size: int) -> dict[str, int]:
    """Bytes by part (PARTS) on each device of a stage, at the step's peak."""
    return {
        "weights": weight_bytes(config, stage.parameters, dp_size),
        "gradients": gradient_bytes(config, stage.parameters, dp_size),
        "optimizer": optimizer_bytes(config, stage.parameters, dp_size),
        "communication": communication_bytes(config, stage.parameters),
        "activations": activation_bytes(config, stage, dp_size),
        "logits": logit_bytes(config) if stage.has_head else 0,
    }


def weight_bytes(config: Config, parameters: int, dp_size: int) -> int:
    """e P; ZeRO 3 cuts them over the replicas: e P / D."""
    return value_bytes(config) * _share(parameters, dp_size if config.parallel.zero_stage == 3 else 1)


def gradient_bytes(config: Config, parameters: int, dp_size: int) -> int:
    """Summed over the micro-batches in fp32, also in bf16: 4 P; ZeRO 2 and 3 keep the own part: 4 P / D."""
    return 4 * _share(parameters, dp_size if config.parallel.zero_stage >= 2 else 1)


def optimizer_bytes(config: Config, parameters: int, dp_size: int) -> int:
    """AdamW's two fp32 moments: 8 P without ZeRO. From ZeRO 1 on cut over the replicas, with an fp32 copy of the
    weights, which DeepSpeed also keeps where the weights are fp32: 12 P / D."""
    return 8 * parameters if config.parallel.zero_stage == 0 else 12 * _share(parameters, dp_size)


def communication_bytes(config: Config, parameters: int) -> int:
    """DeepSpeed's buffers. Gradients travel in buckets of 500 M values: flattened copies of what there is (ZeRO 0, and
    1 in bf16), or one buffer of the whole size (ZeRO 1 in fp32, 2, 3). ZeRO 3 also keeps gathered weights alive, up to
    1 G values."""
    zero, e = config.parallel.zero_stage, value_bytes(config)
    if zero == 0 or (zero == 1 and config.training.precision == "bf16"):
        return 4 * min(parameters, BUCKET_VALUES)
    gathered = e * min(parameters, LIVE_VALUES) if zero == 3 else 0
    return e * BUCKET_VALUES + gathered


def activation_bytes(config: Config, stage: Stage, dp_size: int) -> int:
    """What the backward needs, for all micro-batches that are under way at once: p - i of them on stage i of p.

    With activation checkpointing only the inputs of the blocks, and one whole block while it runs again.
    """
    training, d = config.training, config.model.hidden_size
    tokens = training.micro_batch_size * training.seq_length
    micro_batches = training.global_batch_size // (training.micro_batch_size * dp_size)
    in_flight = min(config.parallel.pp - stage.index, micro_batches)
    blocks = [
        block_activation_bytes(config, config.ffn.of_block(int(layer.name.removeprefix("blocks."))))
        for layer in stage.layers
        if layer.name.startswith("blocks.")
    ]
    final_norm = norm_activation_bytes(config) if any(layer.name == "final_norm" for layer in stage.layers) else 0
    if not training.activation_checkpointing:
        return tokens * in_flight * (sum(blocks) + final_norm)
    kept = value_bytes(config) * d * len(blocks) + final_norm
    return tokens * (in_flight * kept + max(blocks, default=0))


def block_activation_bytes(config: Config, ffn: FFNConfig) -> int:
    """Per token, what one block saves for its backward, run as written; torch.compile saves less.

    Both norms; queries, keys, values, the attention's output and one fp32 log-sum per head (scores are never kept); the
    inner vectors of structured maps; fc1's output and what the activation makes of it (f values, with SwiGLU 2 f: its
    gate and the product).
    """
    model, e = config.model, value_bytes(config)
    f, heads = model.ffn_hidden_size, model.num_attention_heads
    attention = 2 * e * (model.attention_width + model.kv_heads * model.attention_head_dim) + 4 * heads
    width, d = STRUCTURES[ffn.structure].inner_width, model.hidden_size
    inner = width(d, model.fc1_out_features, **ffn.sizes) + width(f, d, **ffn.sizes)
    activated = 2 * f if model.activation == "swiglu" else f
    return 2 * norm_activation_bytes(config) + attention + e * (inner + model.fc1_out_features + activated)


def norm_activation_bytes(config: Config) -> int:
    """Per token, input and output and the fp32 statistics; RMSNorm, written out, keeps the input in fp32 and the
    normalised vector as well."""
    d, e = config.model.hidden_size, value_bytes(config)
    return 2 * e * d + 8 if config.model.norm == "layernorm" else (4 + 2 * e) * d + 4


def logit_bytes(config: Config) -> int:
    """The logits and, in the loss's backward, three fp32 tensors of their size (log-probabilities and two gradients).

    Compiled, the loss keeps the logits and makes their gradient alone.
    """
    training, e = config.training, value_bytes(config)
    tokens = training.micro_batch_size * training.seq_length
    return tokens * config.model.vocab_size * (2 * e if training.compile else e + 12)


def _share(parameters: int, ranks: int) -> int:
    return -(-parameters // ranks)
