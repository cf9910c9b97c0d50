"""The model against a plain PyTorch one."""

from __future__ import annotations

import itertools

import pytest
import torch

from configs import tiny_config
from megastruct.config.schema import Config
from megastruct.models.gpt import GPT
from megastruct.models.loss import cross_entropy
from megastruct.planning.stages import balanced_stages
from plain import plain_model

VARIANTS = {
    "paper": {},
    "dense": {"ffn": {"structure": "dense", "rank": None}},
    "swiglu_rmsnorm_untied_no_bias": {
        "model": {"norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False}
    },
    "gqa_narrow_attention": {"model": {"num_key_value_heads": 2, "head_dim": 6}},
    "qk_norm": {"model": {"qk_norm": True, "num_key_value_heads": 2, "head_dim": 6}},
    "qk_norm_llama": {"model": {"qk_norm": True, "norm": "rmsnorm", "bias": False, "norm_eps": 0.1}},
    "one_key_value_head": {"model": {"num_key_value_heads": 1}},
    "blockdense": {"ffn": {"structure": "blockdense", "nblocks": 4, "rank": 8}},
    "blockshuffle": {"ffn": {"structure": "blockshuffle", "nblocks": 4, "rank": None}},
    "blockshuffle_swiglu": {
        "ffn": {"structure": "blockshuffle", "nblocks": 2, "rank": None},
        "model": {"activation": "swiglu", "bias": False},
    },
}


def perturbed(config: Config) -> GPT:
    """In float64, with biases and norm weights that are not at their trivial start."""
    model = GPT(config).double()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("recompute", [False, True, "selective"])
def test_output_and_every_gradient(variant: str, recompute: bool | str) -> None:
    config = tiny_config(**VARIANTS[variant], training={"activation_checkpointing": recompute})
    model = perturbed(config)
    ids = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(2))
    # Rotary and loss compute in float32 by design: the reference is float64, so the bound is float32's.
    logits = model(ids[:, :-1])
    loss = cross_entropy(logits, ids[:, 1:])
    loss.backward()

    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    plain = torch.stack([plain_model(config, weights, row) for row in ids[:, :-1]])
    picked = plain.log_softmax(-1).gather(-1, ids[:, 1:, None])
    (-picked.mean()).backward()

    torch.testing.assert_close(logits.transpose(0, 1), plain, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(loss, (-picked.mean()).float(), rtol=1e-6, atol=1e-6)
    for name, p in model.named_parameters():
        assert weights[name].grad is not None and p.grad is not None
        torch.testing.assert_close(
            p.grad, weights[name].grad, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_later_token_changes_nothing_before_it() -> None:
    model = GPT(tiny_config())
    ids = torch.arange(8)[None]
    changed = ids.clone()
    changed[0, 5] = 63
    difference = (model(ids) - model(changed)).abs().amax((1, 2))
    assert torch.equal(difference[:5], torch.zeros(5))
    assert (difference[5:] > 0).all()


def test_weights_depend_on_names_and_seed_alone() -> None:
    shallow = GPT(tiny_config(model={"num_layers": 2})).state_dict()
    deep = GPT(tiny_config(model={"num_layers": 6})).state_dict()
    assert all(torch.equal(deep[name], tensor) for name, tensor in shallow.items())
    other = GPT(tiny_config(model={"num_layers": 2}, run={"seed": 7})).state_dict()
    assert not torch.equal(other["embedding.weight"], shallow["embedding.weight"])


def test_first_block_stays_dense_by_the_config_field() -> None:
    names = set(GPT(tiny_config()).state_dict())
    assert {"blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.u", "blocks.1.mlp.fc1.v"} <= names
    assert "blocks.0.mlp.fc1.u" in set(GPT(tiny_config(ffn={"dense_first_block": False})).state_dict())


@pytest.mark.parametrize(
    ("costs", "stages", "boundaries"),
    [
        ([0, 4, 4, 4, 4, 0, 2], 2, [0, 3, 7]),
        ([0, 1, 1, 1, 1, 0, 100], 4, [0, 2, 3, 4, 7]),
        ([5], 1, [0, 1]),
        ([1, 1, 1], 3, [0, 1, 2, 3]),
    ],
)
def test_balanced_stages(costs: list[int], stages: int, boundaries: list[int]) -> None:
    cut = balanced_stages(costs, stages)
    sums = [sum(costs[a:b]) for a, b in itertools.pairwise(cut)]
    wanted = [sum(costs[a:b]) for a, b in itertools.pairwise(boundaries)]
    assert all(a < b for a, b in itertools.pairwise(cut))
    assert max(sums) <= max(wanted)
