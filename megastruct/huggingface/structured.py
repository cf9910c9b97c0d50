"""The structured form: the factors of every structure under our own names, and the file that computes with them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megastruct.config.schema import Config
from megastruct.errors import Problem, UserError

MODELING_MODULE = "modeling_megastruct"
# What the modelling file computes. It is read by users of exported models, who may not have other packages.
STRUCTURES = ("dense", "lowrank", "blockdense", "blockshuffle")
ACTIVATIONS = {"gelu": False, "swiglu": True}  # whether they are gated


def modeling_file() -> Path:
    """The file that goes into the exported folder. It is only located here: importing it needs transformers."""
    spec = find_spec(f"megastruct.huggingface.{MODELING_MODULE}")
    assert spec and spec.origin
    return Path(spec.origin)


def check_structured(config: Config) -> None:
    """Raises UserError if the modelling file does not have the model's structure or activation."""
    problems = [
        Problem(
            "--form structured", f"{key} = {name} is not in the modelling file, which has {', '.join(known)}", advice
        )
        for key, name, known, advice in (
            ("ffn.structure", config.ffn.structure, STRUCTURES, "--form merged"),
            ("model.activation", config.model.activation, tuple(ACTIVATIONS), ""),
        )
        if name not in known
    ]
    if problems:
        raise UserError(problems)


def structured_config(config: Config) -> dict[str, Any]:
    """The keys of config.json that describe the model."""
    model, ffn = config.model, config.ffn
    return {
        "architectures": ["MegastructForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODELING_MODULE}.MegastructConfig",
            "AutoModelForCausalLM": f"{MODELING_MODULE}.MegastructForCausalLM",
        },
        "model_type": "megastruct",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.attention_head_dim,
        "max_position_embeddings": config.training.seq_length,
        "norm": model.norm,
        "norm_eps": model.norm_eps,
        "qk_norm": model.qk_norm,
        "gated": ACTIVATIONS[model.activation],
        "bias": model.bias,
        "rope_theta": model.rope_base,
        "logit_scale": model.logit_scale,
        "structure": ffn.structure,
        "structure_sizes": ffn.sizes,
        "dense_first_block": ffn.dense_first_block,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }
