"""Parameters and FLOPs of a model, from its config alone. Source: arXiv 2406.16450, section 4 (table 1 agrees).

FLOPs are those of matrix products only, two per multiply-add. Attention scores count the full sequence, although half
of them are masked, as are those between documents. The backward costs two forwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megastruct.config.schema import Config, FFNConfig
from megastruct.parallel.sizes import words_per_rank
from megastruct.structures import STRUCTURES
from megastruct.structures.numbers import LinearMap

PARTS = ("attention_projections", "attention_scores", "ffn", "head")


@dataclass(frozen=True)
class LayerCost:
    """One layer of the list in gpt.py: parameters, and forward FLOPs per token by part (see PARTS).

    A tensor-parallel rank holds `parameters_per_rank` of the parameters; the last rank has fewer if the words do not
    divide. `replicated_parameters` of them are the same on every rank, and their gradients are summed over the ranks.
    """

    name: str
    parameters: int
    parameters_per_rank: int
    replicated_parameters: int = 0
    flops: Mapping[str, int] = field(default_factory=dict)
    ffn_weights: int = 0
    guide_weights: int = 0  # of the guides in self-guided training (none in dense blocks); not in `parameters`
    vectors_per_rank: int = 0  # of `parameters_per_rank`, those of norms and biases

    @property
    def forward_flops(self) -> int:
        """Forward FLOPs per token."""
        return sum(self.flops.values())


def layer_costs(config: Config) -> list[LayerCost]:
    """One entry per layer of `gpt.named_layers`, then the head; a tied head has FLOPs but no parameters of its own."""
    model = config.model
    d, v = model.hidden_size, model.vocab_size
    words = (v * d, words_per_rank(v, config.parallel.tp) * d)
    norm = d * (2 if model.norm == "layernorm" and model.bias else 1)
    blocks = [_block_cost(config, index, norm) for index in range(model.num_layers)]
    head = LayerCost("head", *((0, 0) if model.tie_embeddings else words), flops={"head": 2 * v * d})
    final_norm = LayerCost("final_norm", norm, norm, norm, vectors_per_rank=norm)
    return [LayerCost("embedding", *words), *blocks, final_norm, head]


def total_parameters(config: Config) -> int:
    """Parameters of the whole model, without guides; a tied head counts once."""
    return sum(layer.parameters for layer in layer_costs(config))


def ffn_parameters(config: Config) -> int:
    """Weight entries of all FFN linears, without biases, as the paper counts them."""
    return sum(layer.ffn_weights for layer in layer_costs(config))


def forward_flops_per_token(config: Config) -> int:
    """Forward FLOPs per token of the whole model, without guides."""
    return sum(layer.forward_flops for layer in layer_costs(config))


def forward_flops_by_part(config: Config) -> dict[str, int]:
    """Forward FLOPs per token by part of the model (PARTS)."""
    layers = layer_costs(config)
    return {part: sum(layer.flops.get(part, 0) for layer in layers) for part in PARTS}


def training_flops_per_token(config: Config, guide_share: float = 0.0) -> float:
    """FLOPs per token of forward and backward. `guide_share`: the share of the tokens that guides are evaluated for."""
    return 3 * (forward_flops_per_token(config) + 2 * guide_share * guide_weights(config))


def mean_guide_share(config: Config) -> float:
    """The mean share of the tokens that a guide sees in the guided steps: the mean of alpha, or 1 without skipping."""
    return 1.0 if config.guided.skip == "none" else 0.5


def dense_equivalent(config: Config) -> Config:
    """The same model with dense FFNs everywhere."""
    return config.model_copy(update={"ffn": FFNConfig()})


def guide_weights(config: Config) -> int:
    """The number of weights of all guides (dense blocks have none)."""
    return sum(layer.guide_weights for layer in layer_costs(config))


def guided_fraction(config: Config, dense: Config | None = None) -> float:
    """The fraction g of the base steps that the FLOP-matched schedule guides; their data is read again without guides.

    Such a run costs as much as the dense one: F_struct (1 + g) + g F_guide/2 = F_dense, where F are forward FLOPs of
    whole models and the guide is evaluated half of the time (always with `guided.skip: none`, so F_guide is not
    halved). `dense` is the model to be matched, if it is not the same model with dense FFNs; the paper's wide models
    match their GQA baselines. The result is 0 if the structured model costs as much as the dense one.
    """
    structured, matched = (forward_flops_per_token(c) for c in (config, dense or dense_equivalent(config)))
    guide = 2 * mean_guide_share(config) * guide_weights(config)
    return max(0.0, (matched - structured) / (structured + guide))


def ffn_linears(config: Config, ffn: FFNConfig) -> tuple[LinearMap, LinearMap]:
    """fc1 and fc2 of a block whose FFN is `ffn`."""
    model, structure = config.model, STRUCTURES[ffn.structure]
    return (
        structure.linear_map("column", model.hidden_size, model.fc1_out_features, ffn.sizes),
        structure.linear_map("row", model.ffn_hidden_size, model.hidden_size, ffn.sizes),
    )


def _block_cost(config: Config, index: int, norm: int) -> LayerCost:
    model, tp = config.model, config.parallel.tp
    d, a, with_bias = model.hidden_size, model.attention_width, int(model.bias)
    kv = model.kv_heads * model.attention_head_dim
    attention = 2 * a * d + 2 * kv * d
    ffn = config.ffn.of_block(index)
    linears = ffn_linears(config, ffn)
    ffn_weights = sum(linear.weights for linear in linears)
    biases = with_bias * ((a + 2 * kv + d) + (model.fc1_out_features + d))
    norms = 2 * norm + (2 * model.attention_head_dim if model.qk_norm else 0)
    parameters = attention + ffn_weights + biases + norms
    # Norms, the biases of the row maps (attention's output, fc2), and keys and values with fewer heads than ranks.
    replicated = norms + with_bias * 2 * d + sum(linear.replicated_weights for linear in linears)
    replicated += 2 * kv * (d + with_bias) if model.kv_heads % tp else 0
    multiply_adds = sum(linear.multiply_adds for linear in linears)
    replicated_biases = with_bias * (2 * d + (2 * kv if model.kv_heads % tp else 0))
    scores = 2 * config.training.seq_length * a
    return LayerCost(
        f"blocks.{index}",
        parameters,
        replicated + (parameters - replicated) // tp,
        replicated,
        {
            "attention_projections": 2 * attention,
            "attention_scores": 2 * scores,
            "ffn": 2 * multiply_adds,
        },
        ffn_weights,
        0 if ffn.is_dense else sum(linear.weights for linear in ffn_linears(config, FFNConfig())),
        norms + replicated_biases + (biases - replicated_biases) // tp,
    )


def has_block_kernel(head_dim: int) -> bool:
    """Whether FlexAttention's kernels support heads of this width, on a GPU in half precision.

    The width must be at least 16, and a power of two, which older releases of PyTorch require.
    """
    return head_dim >= 16 and head_dim.bit_count() == 1
