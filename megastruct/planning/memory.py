"""Memory of one device by part, from the config alone: formulas, nothing is built.

Letters: P parameters of the device (its share of the stage's), D replicas, tp tensor-parallel ranks, e bytes of a value
(4 in fp32, 2 in bf16), d hidden size, f FFN width, a attention width, V vocabulary.

What is not counted: the device's context, workspaces, fragmentation, and what lives within one operator only.
"""

from __future__ import annotations

from collections.abc import Mapping

from megastruct.config.activations import ACTIVATIONS
from megastruct.config.schema import Config, FFNConfig
from megastruct.optimizers import OPTIMIZERS, Role
from megastruct.parallel.sizes import words_per_rank
from megastruct.planning.cost import ffn_linears, has_block_kernel
from megastruct.planning.ownership import round_bytes
from megastruct.planning.stages import Stage

LIVE_VALUES = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
PREFETCHED_VALUES = 50_000_000  # DeepSpeed's stage3_prefetch_bucket_size
MAX_BUCKET_VALUES = 500_000_000  # DeepSpeed's own reduce_bucket_size
ALWAYS_HELD = ("weights", "gradients", "optimizer")  # of PARTS, from the first step to the last
PARTS = ("weights", "gradients", "optimizer", "communication", "activations", "logits", "guides")


def value_bytes(config: Config) -> int:
    """Bytes of a weight or activation: 2 in bf16, 4 in fp32."""
    return 2 if config.training.precision == "bf16" else 4


def bucket_values(num_parameters: int) -> int:
    """Values that DeepSpeed reduces at once, and has room for: no more than the gradients of a device.

    Some of its optimizers allocate the whole bucket, however small the model is.
    """
    return min(MAX_BUCKET_VALUES, num_parameters)


def memory_by_part(config: Config, stage: Stage, dp_size: int) -> dict[str, int]:
    """Bytes by part (PARTS) on each device of a stage, at the step's peak."""
    parameters = stage.parameters_per_device
    activations, logits = activation_bytes(config, stage, dp_size), logit_bytes(config) if stage.has_head else 0
    # The optimizer's step works where the activations were.
    step = max(0, round_bytes(config, stage, dp_size) - activations - logits)
    return {
        "weights": weight_bytes(config, parameters, dp_size),
        "gradients": gradient_bytes(config, parameters, dp_size),
        "optimizer": optimizer_bytes(config, stage.parameters_by_role, dp_size) + step,
        "communication": communication_bytes(config, parameters),
        "activations": activations,
        "logits": logits,
        "guides": guide_bytes(config, stage, dp_size) if config.guided.schedule != "off" else 0,
    }


def weight_bytes(config: Config, parameters: int, dp_size: int) -> int:
    """Weights: e P; ZeRO 3 cuts them over the replicas: e P / D."""
    return value_bytes(config) * _share(parameters, dp_size if config.parallel.zero_stage == 3 else 1)


def gradient_bytes(config: Config, parameters: int, dp_size: int) -> int:
    """Summed over the micro-batches in fp32, also in bf16: 4 P; ZeRO 2 and 3 keep the own part: 4 P / D.

    In bf16 with ZeRO 1, DeepSpeed's `BF16_Optimizer` keeps the gradients of a micro-batch beside them: e P more. In
    fp32 with ZeRO 1 and 2, the own part is copied out of the bucket before the next one is filled: 4 P / D more, if
    there is more than one bucket.
    """
    zero, in_bf16 = config.parallel.zero_stage, config.training.precision == "bf16"
    more = 0
    if zero == 1 and in_bf16:
        more = 2 * parameters
    elif zero in (1, 2) and not in_bf16 and parameters > bucket_values(parameters):
        more = 4 * _share(parameters, dp_size)
    return 4 * _share(parameters, dp_size if zero >= 2 else 1) + more


def optimizer_bytes(config: Config, parameters: Mapping[Role, int], dp_size: int) -> int:
    """The optimizer's state of the device's parameters, by role, as its record says: for AdamW two fp32 moments, 8 P;
    for Muon's matrices one, 4 P.

    From ZeRO 1 on it is cut over the replicas, with an fp32 copy of the weights, which DeepSpeed also keeps where the
    weights are fp32: for AdamW 12 P / D.
    """
    zero, optimizer = config.parallel.zero_stage > 0, OPTIMIZERS[config.optimizer.kind]
    return sum(
        optimizer.bytes_per_parameter(role, with_master=zero) * _share(count, dp_size if zero else 1)
        for role, count in parameters.items()
    )


def communication_bytes(config: Config, parameters: int) -> int:
    """DeepSpeed's buffers. Gradients travel in buckets of b = `bucket_values`, and what is sent is a copy:

    - ZeRO 0, and 1 in bf16: flattened, fp32: 4 b.
    - ZeRO 1 in fp32: a second buffer, or a flattened copy of the first one: 8 b.
    - ZeRO 2: a buffer and a flattened copy; in bf16 also the fp32 copy of that which is sent: 8 b in both.
    - ZeRO 3: an fp32 buffer, which stays, also in bf16, and the flattened copy whose parts are sent: 8 b. Besides it
      keeps gathered weights, up to 1 G values, and those that come next, up to 50 M. A single bucket is sent when the
      backward is over, after these have gone.
    """
    zero, bucket = config.parallel.zero_stage, bucket_values(parameters)
    if zero == 0 or (zero == 1 and config.training.precision == "bf16"):
        return 4 * bucket
    if zero < 3:
        return 8 * bucket
    gathered = value_bytes(config) * (min(parameters, LIVE_VALUES) + min(parameters, PREFETCHED_VALUES))
    return 4 * bucket + (max(4 * bucket, gathered) if parameters <= bucket else 4 * bucket + gathered)


def activation_bytes(config: Config, stage: Stage, dp_size: int) -> int:
    """What the backward needs, for all micro-batches that are under way at once: p - i of them on stage i of p.

    With activation checkpointing only the inputs of the blocks, and one whole block while it runs again; if it is
    selective, also `kept_block_bytes` of every block. Where attention stays inside of documents without a kernel for
    that, also the mask [b, 1, s, s] that all blocks of the stage share.
    """
    training, tp = config.training, config.parallel.tp
    tokens, in_flight = _tokens_and_micro_batches(config, stage, dp_size)
    blocks = [block_activation_bytes(config, config.ffn.of_block(index)) for index in stage.blocks]
    others = norm_activation_bytes(config) if any(layer.name == "final_norm" for layer in stage.layers) else 0
    if has_dense_mask(config) and blocks:
        others += value_bytes(config) * training.seq_length
    if not training.activation_checkpointing:
        return tokens * in_flight * (sum(blocks) + others)
    kept = _share(value_bytes(config) * config.model.hidden_size, tp) * len(blocks) + others
    if training.activation_checkpointing == "selective":
        kept += sum(kept_block_bytes(config, config.ffn.of_block(index)) for index in stage.blocks)
    return tokens * (in_flight * kept + max(blocks, default=0))


def guide_bytes(config: Config, stage: Stage, dp_size: int) -> int:
    """What the guides of self-guided training add to all the other parts together; free when their phase ends."""
    own = stage.parameters_per_device
    with_guides = own + stage.guide_weights // config.parallel.tp
    divided = (weight_bytes, gradient_bytes)
    state = sum(part(config, with_guides, dp_size) - part(config, own, dp_size) for part in divided)
    by_role = stage.parameters_by_role
    more: dict[Role, int] = {**by_role, "guide": with_guides - own}
    state += optimizer_bytes(config, more, dp_size) - optimizer_bytes(config, by_role, dp_size)
    state += communication_bytes(config, with_guides) - communication_bytes(config, own)
    tokens, in_flight = _tokens_and_micro_batches(config, stage, dp_size)
    guided_blocks = sum(layer.guide_weights > 0 for layer in stage.layers)
    if not config.training.activation_checkpointing:
        return state + tokens * in_flight * guided_blocks * guide_activation_bytes(config)
    kept = kept_guide_bytes(config) if config.training.activation_checkpointing == "selective" else 0
    return state + tokens * (in_flight * guided_blocks * kept + min(guided_blocks, 1) * guide_activation_bytes(config))


def guide_activation_bytes(config: Config) -> int:
    """Per token of the sequence, what the guides of one block save for the backward, at most.

    Where a guide sees all tokens its inputs are those of the structured linear, but that over tensor-parallel ranks the
    gathered input of fc1 is its own. Rows are copied: the largest share of them that is not the whole.
    """
    e, tp, guided = value_bytes(config), config.parallel.tp, config.guided
    gathered = e * config.model.hidden_size
    if guided.skip != "rows" or guided.levels == 1:
        return gathered if tp > 1 else 0
    return _largest_share(config, gathered + _share(e * config.model.ffn_hidden_size, tp))


def kept_guide_bytes(config: Config) -> int:
    """Per token of the sequence, what selective recomputation keeps of the guides of one block, at most.

    The outputs of both, and over tensor-parallel ranks the gathered input of fc1's.
    """
    model, tp = config.model, config.parallel.tp
    values = _share(model.fc1_out_features + model.hidden_size, tp) + (model.hidden_size if tp > 1 else 0)
    return _largest_share(config, value_bytes(config) * values)


def _largest_share(config: Config, num_bytes: int) -> int:
    """Of `num_bytes` for all rows, those of the largest share of them that is not the whole."""
    skip, levels = config.guided.skip, config.guided.levels
    return num_bytes * (levels - 1) // levels if skip == "rows" and levels > 1 else num_bytes


def block_activation_bytes(config: Config, ffn: FFNConfig) -> int:
    """Per token of the sequence, what one block saves on a device for its backward, run as written; torch.compile saves
    less. Under tensor parallelism in three parts:

    - of own tokens (1/tp): what the norms keep of their input; the input of a structured fc1, whose first factor acts
      before the gather; the inner vector of a structured fc2.
    - of own features, all tokens (1/tp): queries, keys, values, the attention's output and one fp32 log-sum per head
      (scores are never kept); with `model.qk_norm`, the input of those norms; fc1's output and what the activation
      makes of it (f values, with SwiGLU 2 f: its gate and the product).
    - gathered, whole on every device: the input of the attention; of fc1 the input, or its inner vector if structured;
      with fewer key/value heads than ranks, the input of their norm.
    """
    model, e, tp = config.model, value_bytes(config), config.parallel.tp
    fc1, fc2 = ffn_linears(config, ffn)
    f, heads, norm_output = model.ffn_hidden_size, model.num_attention_heads, e * model.hidden_size
    # With fewer key/value heads than ranks, or with a dense mask, every query head of a rank has its own copy of them.
    copied = model.kv_heads % tp or has_dense_mask(config)
    kv_heads = heads if copied else model.kv_heads
    attention = 2 * e * (heads + kv_heads) * model.attention_head_dim + 4 * heads
    head_norm = _rms_norm_input_bytes(model.attention_head_dim) if model.qk_norm else 0
    whole_kv_heads = model.kv_heads if model.kv_heads % tp else 0
    attention += head_norm * (heads + model.kv_heads - whole_kv_heads)
    whole = norm_output + head_norm * whole_kv_heads
    activated = ACTIVATIONS[model.activation].kept_values * f
    divided = 2 * _norm_input_bytes(config) + attention + e * (model.fc1_out_features + activated + fc2.inner_width)
    if fc1.inner_width:
        return _share(divided + norm_output, tp) + whole + e * fc1.inner_width
    return _share(divided, tp) + whole + norm_output


def kept_block_bytes(config: Config, ffn: FFNConfig) -> int:
    """Per token of the sequence, what selective recomputation keeps of one block, besides the block's input.

    Outputs of products: queries, keys, values, the attention's map, both maps of the FFN with their inner vectors; the
    attention's output, with one fp32 log-sum per head. Over tensor-parallel ranks also what collectives return: the
    gathered inputs of the attention and of fc1, or its gathered inner vector; the own part of what is summed.
    """
    model, e, tp = config.model, value_bytes(config), config.parallel.tp
    fc1, fc2 = ffn_linears(config, ffn)
    cut = tp if model.kv_heads % tp == 0 else 1
    kv = _share(2 * model.kv_heads * model.attention_head_dim, cut)
    divided = 2 * model.num_attention_heads * model.attention_head_dim + 2 * model.hidden_size + model.fc1_out_features
    exchange = fc2.exchange(tp)
    exchanged = tp > 1 and exchange.collective == "all_to_all"  # both what is sent and what is received
    inner = fc1.inner_width + (0 if exchanged else fc2.inner_width)
    values = kv + _share(divided + inner, tp) + (2 * exchange.width if exchanged else 0)
    if tp > 1:
        values += model.hidden_size + (fc1.inner_width or model.hidden_size)
    return e * values + _share(4 * model.num_attention_heads, tp)


def has_dense_mask(config: Config) -> bool:
    """Whether attention on a GPU adds a mask to its scores, instead of leaving blocks of them out."""
    training = config.training
    in_blocks = training.precision == "bf16" and has_block_kernel(config.model.attention_head_dim)
    return training.document_attention == "separate" and not in_blocks


def norm_activation_bytes(config: Config) -> int:
    """Per token of the sequence, a norm and the sharded map behind it: the norm's input, of own tokens, and its output,
    gathered by the map."""
    return _share(_norm_input_bytes(config), config.parallel.tp) + value_bytes(config) * config.model.hidden_size


def _norm_input_bytes(config: Config) -> int:
    """Per own token, the input of a norm and its fp32 statistics."""
    d, e = config.model.hidden_size, value_bytes(config)
    return e * d + 8 if config.model.norm == "layernorm" else _rms_norm_input_bytes(d)


def _rms_norm_input_bytes(width: int) -> int:
    """RMSNorm, where PyTorch has no kernel for it, keeps the input and the normalised vector in fp32."""
    return 8 * width + 4


def logit_bytes(config: Config) -> int:
    """The logits and, in the loss's backward, three fp32 tensors of their size (log-probabilities and two gradients).

    Compiled, the loss keeps the logits and makes their gradient alone. Over tensor-parallel ranks each has the logits
    of its words, and besides them at most two fp32 tensors of their size, three in bf16; that loss is never compiled.
    """
    training, e, tp = config.training, value_bytes(config), config.parallel.tp
    values = training.micro_batch_size * training.seq_length * words_per_rank(config.model.vocab_size, tp)
    if tp > 1:
        return values * (e + (12 if e == 2 else 8))
    return values * (2 * e if training.compile else e + 12)


def _tokens_and_micro_batches(config: Config, stage: Stage, dp_size: int) -> tuple[int, int]:
    """(tokens of a micro-batch, micro-batches that are under way at once on the stage)"""
    training = config.training
    micro_batches = training.global_batch_size // (training.micro_batch_size * dp_size)
    return training.micro_batch_size * training.seq_length, min(config.parallel.pp - stage.index, micro_batches)


def _share(parameters: int, ranks: int) -> int:
    return -(-parameters // ranks)
