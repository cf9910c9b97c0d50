"""Parameters and FLOPs against the numbers printed in arXiv 2406.16450, and against the model as built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs import tiny_config
from megastruct.config import load_config
from megastruct.models.gpt import ALONE, GPT, named_layers
from megastruct.planning.cost import (
    ffn_parameters,
    forward_flops_by_part,
    forward_flops_per_token,
    guided_fraction,
    layer_costs,
    total_parameters,
    training_flops_per_token,
)
from megastruct.planning.steps import check_guided_steps, guided_steps, total_tokens, total_training_flops

RUNS = Path(__file__).resolve().parents[2] / "configs" / "run"

# run -> (parameters in millions, training FLOPs), as printed; table 1 for xl, section 4 for the dense ones
GOLDEN = {
    "s_dense": (109.6, 1.69e18),
    "m_dense": (335.1, 1.55e19),
    "l_dense": (729.1, 7.03e19),
    "xl_dense": (1274.1, 2.10e20),
    "xl_lowrank_63": (984.7, 1.66e20),
    "xl_lowrank_32": (743.6, 1.29e20),
    "xl_blockdense_63": (954.6, 1.61e20),
    "xl_blockdense_32": (728.5, 1.27e20),
    "xl_blockshuffle_63": (984.7, 1.66e20),
    "xl_blockshuffle_32": (743.6, 1.29e20),
}
GOLDEN_FFN = {
    "xl_dense": 805.3,
    "xl_lowrank_63": 515.9,
    "xl_lowrank_32": 274.7,
    "xl_blockdense_63": 485.8,
    "xl_blockdense_32": 259.7,
    "xl_blockshuffle_63": 515.9,
    "xl_blockshuffle_32": 274.7,
}
# wide and structured networks, whole millions as printed
GOLDEN_WIDE = {
    "m_dense": 335,
    "m_gqa": 335,
    "m_wide_lowrank_63": 219,
    "l_dense": 729,
    "l_gqa": 729,
    "l_wide_lowrank_63": 464,
}
# ratio of the FLOP-matched schedule at 32 %, by size
GOLDEN_GUIDED = {
    "lowrank": {"s": 0.301, "m": 0.380, "l": 0.413, "xl": 0.432},
    "blockdense": {"s": 0.301, "m": 0.395, "l": 0.413, "xl": 0.449},
}


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


@pytest.mark.parametrize("name", sorted(GOLDEN_WIDE))
def test_published_parameters_of_wide_models(name: str) -> None:
    assert round(total_parameters(load_config(RUNS / f"{name}.yaml")) / 1e6) == GOLDEN_WIDE[name]


@pytest.mark.parametrize("size", ["m", "l"])
def test_wide_models_cost_what_their_baseline_costs(size: str) -> None:
    """Their training lengths are chosen so, to the half percent that rounded tokens leave."""
    costs = []
    for name in ("dense", "gqa", "wide_lowrank_63"):
        config = load_config(RUNS / f"{size}_{name}.yaml")
        assert config.training.num_tokens is not None
        costs.append(training_flops_per_token(config) * config.training.num_tokens)
    assert max(costs) / min(costs) < 1.005


@pytest.mark.parametrize(("structure", "size"), [(k, s) for k, sizes in GOLDEN_GUIDED.items() for s in sizes])
def test_published_guided_fraction(structure: str, size: str) -> None:
    config = load_config(RUNS / f"{size}_{structure}_32.yaml")
    assert round(guided_fraction(config), 3) == GOLDEN_GUIDED[structure][size]
    assert guided_fraction(load_config(RUNS / f"{size}_dense.yaml")) == 0.0


@pytest.mark.parametrize(("size", "published"), [("m", 0.40), ("l", 0.395)])
def test_guided_fraction_of_wide_models(size: str, published: float) -> None:
    """Against the GQA baseline that they match; published by hand, to two or three digits."""
    wide, gqa = (load_config(RUNS / f"{size}_{name}.yaml") for name in ("wide_lowrank_63", "gqa"))
    assert guided_fraction(wide, gqa) == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize(("structure", "size"), [(k, s) for k, sizes in GOLDEN_GUIDED.items() for s in sizes])
def test_guided_runs_cost_what_the_dense_one_does(structure: str, size: str) -> None:
    """To what rounding to whole steps leaves."""
    guided, dense = (load_config(RUNS / f"{size}_{name}.yaml") for name in (f"{structure}_32_guided", "dense"))
    assert total_training_flops(guided) == pytest.approx(total_training_flops(dense), rel=3e-4)
    base = dense.training.num_tokens
    assert base and total_tokens(guided) == pytest.approx(base * (1 + GOLDEN_GUIDED[structure][size]), rel=1e-3)


@pytest.mark.parametrize(("size", "guided"), [("m", 0.40), ("l", 0.395)])
def test_wide_guided_runs(size: str, guided: float) -> None:
    wide, gqa = (load_config(RUNS / f"{size}_{name}.yaml") for name in ("wide_lowrank_63_guided", "gqa"))
    assert guided_steps(wide) == round(guided * gqa.training.base_steps)
    assert total_training_flops(wide) == pytest.approx(total_training_flops(gqa), rel=0.01)


@pytest.mark.parametrize("size", ["s", "m", "l", "xl"])
@pytest.mark.parametrize(("share", "ratio"), [(63, 0.625), (32, 0.3125)])
def test_configs_have_the_share_in_their_name(size: str, share: int, ratio: float) -> None:
    dense = load_config(RUNS / f"{size}_dense.yaml")
    per_block = ffn_parameters(dense) // dense.model.num_layers
    for structure, distance in (("lowrank", 0.0), ("blockshuffle", 0.0), ("blockdense", 0.04)):
        config = load_config(RUNS / f"{size}_{structure}_{share}.yaml")
        assert config.ffn.structure == structure
        found = (ffn_parameters(config) - per_block) / (ffn_parameters(dense) - per_block)
        assert abs(found - ratio) <= distance


VARIANTS = {
    "paper": {},
    "dense": {"ffn": {"structure": "dense", "rank": None}},
    "blockdense": {"ffn": {"structure": "blockdense", "nblocks": 4, "rank": 8}},
    "blockshuffle": {"ffn": {"structure": "blockshuffle", "nblocks": 4, "rank": None}},
    "all_blocks": {"ffn": {"dense_first_block": False}},
    "llama": {"model": {"norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False}},
    "gqa": {"model": {"num_key_value_heads": 2, "head_dim": 6}},
    "qk_norm": {"model": {"num_key_value_heads": 2, "head_dim": 6, "qk_norm": True}},
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_parameters_as_built(variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    model = GPT(config)
    assert total_parameters(config) == sum(p.numel() for p in model.parameters())
    built = {
        layer.name: sum(p.numel() for p in model.get_submodule(layer.name).parameters())
        for layer in named_layers(config, ALONE)
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
    model = GPT(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(2, config.training.seq_length, dtype=torch.int64))
    tokens = 2 * config.training.seq_length
    assert counter.get_total_flops() == forward_flops_per_token(config) * tokens
    scores = sum(flops for name, flops in counter.get_flop_counts()["Global"].items() if "bmm" in str(name))
    if config.ffn.structure != "blockshuffle" and config.ffn.structure != "blockdense":  # whose products are bmm, too
        assert scores == forward_flops_by_part(config)["attention_scores"] * tokens


def test_flops_of_a_guided_run_by_hand() -> None:
    """20 steps of 128 tokens, 10 of them guided and read again; three blocks with guides of 2 x 16 x 48 weights."""
    config = tiny_config(guided={"schedule": "fixedflop", "fraction": 0.5, "levels": 2})
    plain, guides = 3 * forward_flops_per_token(config), 3 * 2 * 3 * 2 * 16 * 48
    assert total_tokens(config) == 128 * 30
    assert total_training_flops(config) == pytest.approx(128 * (30 * plain + 10 * guides / 2))
    always = tiny_config(guided={"schedule": "fixedstep", "skip": "none"})
    assert total_training_flops(always) == pytest.approx(128 * (20 * plain + 10 * guides))


@pytest.mark.parametrize(
    ("sections", "found"),
    [
        ({"ffn": {"rank": 16}, "guided": {"schedule": "fixedflop", "levels": 2}}, "costs as much as the dense one"),
        ({"guided": {"schedule": "fixedstep", "fraction": 0.01, "levels": 2}}, "no guided step of training's 20"),
        ({"guided": {"schedule": "fixedflop", "levels": 2}}, ""),
        ({}, ""),
    ],
)
def test_a_guided_run_needs_a_guided_step(sections: dict[str, dict[str, object]], found: str) -> None:
    problems = list(check_guided_steps(tiny_config(**sections)))
    assert [found in problem.found for problem in problems] == ([True] if found else [])
