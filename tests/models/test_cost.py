"""Parameters and FLOPs against the numbers printed in arXiv 2406.16450, and against the model as built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs import tiny_config
from megastruct.config import load_config
from megastruct.models.cost import ffn_parameters, layer_costs, total_parameters, training_flops_per_token
from megastruct.models.gpt import build_gpt, named_layers

RUNS = Path(__file__).resolve().parents[2] / "configs" / "run"

# run -> (parameters in millions, training FLOPs), as printed; table 1 for xl, section 4 for the dense ones
GOLDEN = {
    "s_dense": (109.6, 1.69e18),
    "m_dense": (335.1, 1.55e19),
    "l_dense": (729.1, 7.03e19),
    "xl_dense": (1274.1, 2.10e20),
    "xl_lowrank_63": (984.7, 1.66e20),
    "xl_lowrank_32": (743.6, 1.29e20),
}
GOLDEN_FFN = {"xl_dense": 805.3, "xl_lowrank_63": 515.9, "xl_lowrank_32": 274.7}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_published_parameters_and_flops(name: str) -> None:
    config = load_config(RUNS / f"{name}.yaml")
    parameters, flops = GOLDEN[name]
    assert round(total_parameters(config) / 1e6, 1) == parameters
    assert config.training.num_tokens is not None
    assert float(f"{training_flops_per_token(config) * config.training.num_tokens:.2e}") == flops


@pytest.mark.parametrize("name", sorted(GOLDEN_FFN))
def test_published_ffn_parameters(name: str) -> None:
    assert round(ffn_parameters(load_config(RUNS / f"{name}.yaml")) / 1e6, 1) == GOLDEN_FFN[name]


@pytest.mark.parametrize(("size", "share", "ratio"), [(s, p, r) for s in "sml" for p, r in ((63, 0.625), (32, 0.3125))])
def test_lowrank_configs_have_the_share_in_their_name(size: str, share: int, ratio: float) -> None:
    dense, lowrank = (load_config(RUNS / f"{size}_{name}.yaml") for name in ("dense", f"lowrank_{share}"))
    per_block = ffn_parameters(dense) // dense.model.num_layers
    assert (ffn_parameters(lowrank) - per_block) / (ffn_parameters(dense) - per_block) == ratio


VARIANTS = {
    "paper": {},
    "dense": {"ffn": {"structure": "dense", "rank": None}},
    "all_blocks": {"ffn": {"dense_first_block": False}},
    "llama": {"model": {"norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False}},
    "gqa": {"model": {"num_key_value_heads": 2, "head_dim": 6}},
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_parameters_as_built(variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    model = build_gpt(config)
    assert total_parameters(config) == sum(p.numel() for p in model.parameters())
    built = {
        layer.name: sum(p.numel() for p in model.get_submodule(layer.name).parameters())
        for layer in named_layers(config)
    }
    costs = {cost.name: cost.parameters for cost in layer_costs(config)}
    assert built.items() <= costs.items()
    ffn = [m for block in model.blocks.children() for m in (block.mlp.fc1, block.mlp.fc2)]
    assert ffn_parameters(config) == sum(p.numel() for m in ffn for n, p in m.named_parameters() if n != "bias")


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_flops_as_counted_by_torch(variant: str) -> None:
    """torch's counter sees every matrix product; it counts all of attention's scores, as the formula does."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config(**VARIANTS[variant])
    model = build_gpt(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(2, config.training.seq_length, dtype=torch.int64))
    tokens = 2 * config.training.seq_length
    assert counter.get_total_flops() == sum(cost.forward_flops for cost in layer_costs(config)) * tokens
