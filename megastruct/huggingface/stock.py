"""The classes of transformers that hold the models of this project, and which of them holds a given one exactly.

Letters: d hidden size, a attention width (heads x head_dim).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megastruct.config.schema import Config, ModelConfig
from megastruct.errors import Problem, UserError

STRUCTURED = "--form structured"  # the form that holds every model
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"
# Modules of a block: our name -> the name in transformers. The names of the MLP's linears depend on the class.
BLOCK_MODULES = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
}
HEAD_NORMS = {"attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm"}


@dataclass(frozen=True)
class StockClass:
    """A class of transformers.

    Attributes:
        model_type, architecture: its names in config.json.
        norm, activation: as in the config's `model` section.
        hidden_act: the activation's name in config.json; of a gated one, that of the gate.
        eps_key: the key of `norm_eps` in config.json.
        fc1, fc2: the names of the MLP's linears below `model.layers.N.mlp`; gate and value of a gated fc1.
        any_head_count: whether the number of heads may not divide d.
        qk_norm: whether it normalises each head of q and k, as `model.qk_norm` does.
        bias_keys: the keys of config.json that say whether linears have biases.
        fixed: further keys of config.json, whose values make it the model of this project.
    """

    model_type: str
    architecture: str
    norm: str
    activation: str
    hidden_act: str
    eps_key: str
    fc1: tuple[str, ...]
    fc2: str
    bias_keys: tuple[str, ...]
    any_head_count: bool = False
    qk_norm: bool = False
    fixed: tuple[tuple[str, Any], ...] = ()

    def block_modules(self) -> dict[str, tuple[str, ...]]:
        """Our name of each module of a block -> its names in transformers, relative to the block."""
        modules = BLOCK_MODULES | (HEAD_NORMS if self.qk_norm else {})
        names = {ours: (theirs,) for ours, theirs in modules.items()}
        return names | {"mlp.fc1": tuple(f"mlp.{name}" for name in self.fc1), "mlp.fc2": (f"mlp.{self.fc2}",)}


GATED, GATED_NAMES = "swiglu", ("gate_proj", "up_proj")
_RMS: dict[str, Any] = {"norm": "rmsnorm", "eps_key": "rms_norm_eps", "bias_keys": ("attention_bias", "mlp_bias")}
_GATED: dict[str, Any] = {"activation": GATED, "hidden_act": "silu", "fc1": GATED_NAMES, "fc2": "down_proj"}
_GELU: dict[str, Any] = {"activation": "gelu", "hidden_act": "gelu_pytorch_tanh"}
_NO_DROPOUT = (("residual_dropout", 0.0), ("embedding_dropout", 0.0))

LLAMA = StockClass("llama", "LlamaForCausalLM", **_RMS, **_GATED)
MISTRAL = replace(LLAMA, model_type="mistral", architecture="MistralForCausalLM", fixed=(("sliding_window", None),))
QWEN3 = StockClass(
    "qwen3",
    "Qwen3ForCausalLM",
    **_RMS | {"bias_keys": ("attention_bias",)},
    **_GATED,
    any_head_count=True,
    qk_norm=True,
    fixed=(("use_sliding_window", False),),
)
GRANITE = StockClass(
    "granite",
    "GraniteForCausalLM",
    **_RMS,
    **_GATED,
    any_head_count=True,
    fixed=(("embedding_multiplier", 1.0), ("logits_scaling", 1.0), ("residual_multiplier", 1.0)),
)
ARCEE = StockClass("arcee", "ArceeForCausalLM", **_RMS, **_GELU, fc1=("up_proj",), fc2="down_proj")
STARCODER2 = StockClass(
    "starcoder2",
    "Starcoder2ForCausalLM",
    norm="layernorm",
    **_GELU,
    eps_key="norm_epsilon",
    fc1=("c_fc",),
    fc2="c_proj",
    bias_keys=("use_bias",),
    any_head_count=True,
    fixed=(("sliding_window", None), *_NO_DROPOUT),
)
STABLELM = StockClass(
    "stablelm",
    "StableLmForCausalLM",
    norm="layernorm",
    **_GATED,
    eps_key="layer_norm_eps",
    bias_keys=("use_qkv_bias",),
    any_head_count=True,
    fixed=(("partial_rotary_factor", 1.0), ("qk_layernorm", False), ("use_parallel_residual", False)),
)


@dataclass(frozen=True)
class Variant:
    """How a stock class holds a model.

    `num_heads`, `kv_heads`: with the heads of zeros that are added. `centred`: the mean is projected out of everything
    that is added to the residual stream, so that an RMSNorm computes what a LayerNorm does.
    """

    stock: StockClass
    num_heads: int
    kv_heads: int
    centred: bool = False

    def ties(self, model: ModelConfig) -> bool:
        """Whether embedding and head are one tensor; the head keeps the means that a centred embedding loses."""
        return model.tie_embeddings and not self.centred


def variant_of(config: Config) -> Variant:
    """The stock class that holds the model, and how.

    Raises UserError with the config keys for which there is none.
    """
    model = config.model
    heads = Variant(STARCODER2, model.num_attention_heads, model.kv_heads)
    divides = model.hidden_size % model.num_attention_heads == 0
    if model.qk_norm:
        return _normalised_heads(model)
    found = f"model.activation = {model.activation}"
    match model.norm, model.activation:
        case "layernorm", "gelu":
            return heads
        case "rmsnorm", "swiglu":
            return replace(heads, stock=LLAMA if divides else GRANITE)
        case "rmsnorm", "gelu":
            return replace(_divisible(model), stock=ARCEE)
        case "layernorm", "swiglu" if not model.bias:
            if model.attention_width == model.hidden_size:
                return replace(heads, stock=STABLELM)
            return replace(heads, stock=LLAMA if divides else GRANITE, centred=True)
        case "layernorm", "swiglu":
            found = "model.norm = layernorm, model.activation = swiglu and model.bias = true together"
    raise UserError(Problem("--form merged", f"no stock class of transformers holds {found}", STRUCTURED))


def stock_config(config: Config, variant: Variant) -> dict[str, Any]:
    """The keys of config.json that describe the model, none left to the defaults of a class."""
    model, stock = config.model, variant.stock
    rope: dict[str, Any] = {"rope_theta": model.rope_base}
    if stock is STABLELM:
        rope["partial_rotary_factor"] = 1.0
    attention = {"attention_multiplier": model.attention_head_dim**-0.5} if stock is GRANITE else {}
    return {
        "architectures": [stock.architecture],
        "model_type": stock.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": variant.num_heads,
        "num_key_value_heads": variant.kv_heads,
        "head_dim": model.attention_head_dim,
        "hidden_act": stock.hidden_act,
        "max_position_embeddings": config.training.seq_length,
        stock.eps_key: model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": variant.ties(model),
        **dict.fromkeys(stock.bias_keys, model.bias),
        **rope,  # where version 4 of transformers looks; version 5 reads rope_parameters
        "rope_parameters": {"rope_type": "default", **rope},
        **attention,
        "attention_dropout": 0.0,
        **dict(stock.fixed),
    }


def _normalised_heads(model: ModelConfig) -> Variant:
    """The only class with such norms before the rotary embedding is gated, and has no biases in its MLP.

    Raises UserError if the model is another.
    """
    if model.activation == GATED and not model.bias:
        return Variant(QWEN3, model.num_attention_heads, model.kv_heads, centred=model.norm == "layernorm")
    other = f"model.activation = {model.activation}" if model.activation != GATED else "model.bias = true"
    found = f"no stock class of transformers holds model.qk_norm = true and {other} together"
    raise UserError(Problem("--form merged", f"{found}; {QWEN3.architecture} is gated and has no biases", STRUCTURED))


def _divisible(model: ModelConfig) -> Variant:
    """The fewest heads that divide d, for classes that refuse others: added heads are filled with zeros.

    Raises UserError if there are none.
    """
    kv, per_kv = model.kv_heads, model.num_attention_heads // model.kv_heads
    fitting = [
        (kv_heads * queries, kv_heads)
        for kv_heads in range(kv, model.hidden_size // per_kv + 1)
        for queries in range(per_kv, model.hidden_size // kv_heads + 1)
        if model.hidden_size % (kv_heads * queries) == 0
    ]
    if not fitting:
        found = f"{model.num_attention_heads} heads cannot be filled up to a number that divides model.hidden_size"
        raise UserError(
            Problem("--form merged", f"{found} = {model.hidden_size}, as ArceeForCausalLM needs", STRUCTURED)
        )
    return Variant(ARCEE, *min(fitting))
