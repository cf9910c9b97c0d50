"""The model against a plain PyTorch one, written out here from the paper's description with other means."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from configs import tiny_config
from megastruct.config.schema import Config
from megastruct.models.gpt import GPT
from megastruct.models.loss import cross_entropy
from megastruct.planning.stages import balanced_stages

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


def dense_weight(w: dict[str, Tensor], name: str) -> Tensor:
    """[M, N], structured ones multiplied out from their definition with matrices of the whole size."""
    if f"{name}.weight" in w:
        return w[f"{name}.weight"]
    v, u = w[f"{name}.v"], w[f"{name}.u"]
    if v.ndim == 2:
        return u @ v
    if u.ndim == 2:
        return u @ torch.block_diag(*v)
    nblocks = len(u)

    def shuffle(features: int) -> Tensor:  # row l * (features / B) + r picks feature r * B + l
        order = [r * nblocks + block for block in range(nblocks) for r in range(features // nblocks)]
        return torch.eye(features, dtype=v.dtype)[order]

    inner, outer = shuffle(u.shape[2] * nblocks), shuffle(u.shape[1] * nblocks)
    return outer.T @ torch.block_diag(*u) @ inner @ torch.block_diag(*v)


def plain_model(config: Config, w: dict[str, Tensor], ids: Tensor) -> Tensor:
    """ids [s] of one sequence -> logits [s, v], position by position and head by head."""
    m = config.model
    dh, heads, kv_heads = m.attention_head_dim, m.num_attention_heads, m.kv_heads

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ dense_weight(w, name).T
        return y + w[f"{name}.bias"] if m.bias else y

    def norm(x: Tensor, name: str) -> Tensor:
        if m.norm == "rmsnorm":
            return x / (x.pow(2).mean(-1, keepdim=True) + m.norm_eps).sqrt() * w[f"{name}.weight"]
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + m.norm_eps).sqrt()
        return x * w[f"{name}.weight"] + (w[f"{name}.bias"] if m.bias else 0)

    def head_norm(x: Tensor, name: str) -> Tensor:  # [s, dh]
        if not m.qk_norm:
            return x
        return x / (x.pow(2).mean(-1, keepdim=True) + m.norm_eps).sqrt() * w[f"{name}.weight"]

    def rope(x: Tensor) -> Tensor:  # [s, dh]: complex numbers turned by position * base^(-2i/dh)
        z = torch.complex(x[:, : dh // 2], x[:, dh // 2 :])
        frequency = torch.tensor([m.rope_base ** (-2 * i / dh) for i in range(dh // 2)], dtype=torch.float64)
        z = z * torch.polar(torch.ones(()).double(), torch.arange(len(x)).double()[:, None] * frequency)
        return torch.cat((z.real, z.imag), -1)

    x = w["embedding.weight"][ids]
    for i in range(m.num_layers):
        block = f"blocks.{i}"
        y = norm(x, f"{block}.attention_norm")
        q, k, v = (linear(y, f"{block}.attention.{name}") for name in ("query", "key", "value"))
        outs = []
        for h in range(heads):
            g = h * kv_heads // heads  # neighbouring query heads share a key/value head
            qh = rope(head_norm(q[:, h * dh : (h + 1) * dh], f"{block}.attention.query_norm"))
            kh = rope(head_norm(k[:, g * dh : (g + 1) * dh], f"{block}.attention.key_norm"))
            scores = qh @ kh.T / math.sqrt(dh)
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            outs.append(scores.softmax(-1) @ v[:, g * dh : (g + 1) * dh])
        x = x + linear(torch.cat(outs, -1), f"{block}.attention.out")
        y = linear(norm(x, f"{block}.mlp_norm"), f"{block}.mlp.fc1")
        if m.activation == "swiglu":
            gate, value = y[:, 0::2], y[:, 1::2]
            y = gate * torch.sigmoid(gate) * value
        else:
            y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + linear(y, f"{block}.mlp.fc2")
    head = w["embedding.weight"] if m.tie_embeddings else w["head.weight"]
    return norm(x, "final_norm") @ head.T


def perturbed(config: Config) -> GPT:
    """In float64, with biases and norm weights that are not at their trivial start."""
    model = GPT(config).double()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("recompute", [False, True])
def test_output_and_every_gradient(variant: str, recompute: bool) -> None:
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
