"""Parameters and FLOPs of a model, from its config alone. Source: arXiv 2406.16450, section 4 (table 1 agrees).

FLOPs count every multiply-add as two, matrix products only; attention scores count the full sequence (the causal
half is not taken off), and the backward costs two forwards.
"""

from __future__ import annotations

from dataclasses import dataclass

from megastruct.config.schema import Config, FFNConfig
from megastruct.ops import cost


@dataclass(frozen=True)
class LayerCost:
    """One layer of the list in gpt.py: parameters, and forward FLOPs per token."""

    name: str
    parameters: int
    forward_flops: int
    ffn_weights: int = 0


def layer_costs(config: Config) -> list[LayerCost]:
    """One entry per layer of `gpt.named_layers`, then the head; a tied head has FLOPs but no parameters of its own."""
    model = config.model
    d, v = model.hidden_size, model.vocab_size
    norm = d * (2 if model.norm == "layernorm" and model.bias else 1)
    blocks = [_block_cost(config, index, norm) for index in range(model.num_layers)]
    head = LayerCost("head", 0 if model.tie_embeddings else v * d, 2 * v * d)
    return [LayerCost("embedding", v * d, 0), *blocks, LayerCost("final_norm", norm, 0), head]


def total_parameters(config: Config) -> int:
    return sum(layer.parameters for layer in layer_costs(config))


def ffn_parameters(config: Config) -> int:
    """Weight entries of all FFN linears, without biases, as the paper counts them."""
    return sum(layer.ffn_weights for layer in layer_costs(config))


def forward_flops_per_token(config: Config) -> int:
    return sum(layer.forward_flops for layer in layer_costs(config))


def training_flops_per_token(config: Config) -> int:
    return 3 * forward_flops_per_token(config)


def _block_cost(config: Config, index: int, norm: int) -> LayerCost:
    model = config.model
    d, f, a = model.hidden_size, model.ffn_hidden_size, model.attention_width
    kv = model.kv_heads * model.attention_head_dim
    attention = 2 * a * d + 2 * kv * d
    ffn = FFNConfig() if index == 0 and config.ffn.dense_first_block else config.ffn
    ffn_weights = _linear_weights(ffn, d, model.fc1_out_features) + _linear_weights(ffn, f, d)
    biases = (a + 2 * kv + d) + (model.fc1_out_features + d) if model.bias else 0
    scores = 2 * config.training.seq_length * a
    return LayerCost(
        f"blocks.{index}",
        attention + ffn_weights + biases + 2 * norm,
        2 * (attention + scores + ffn_weights),
        ffn_weights,
    )


def _linear_weights(ffn: FFNConfig, n: int, m: int) -> int:
    if ffn.structure == "dense":
        return cost.dense_weights(n, m)
    assert ffn.rank is not None  # config/checks.py
    return cost.lowrank_weights(n, m, ffn.rank)
