"""The baseline of the step benchmark is the same dense model: as many parameters, the same loss, the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs import tiny_config
from megastruct.benchmarks.plain_gpt import PlainGPT
from megastruct.config.schema import Config
from megastruct.models.gpt import GPT
from megastruct.models.loss import cross_entropy
from megastruct.planning.cost import total_parameters

MODELS: dict[str, dict[str, Any]] = {
    "as in the paper": {},
    "Llama": {
        "activation": "swiglu",
        "norm": "rmsnorm",
        "bias": False,
        "tie_embeddings": False,
        "num_key_value_heads": 2,
        "norm_eps": 1e-3,
    },
    "swiglu with biases, narrow heads": {"activation": "swiglu", "head_dim": 6, "rope_base": 100.0},
    "norms of heads, widths scaled": {"qk_norm": True, "base_width": 8, "num_key_value_heads": 1},
}


def dense(model: dict[str, Any]) -> Config:
    return tiny_config(model=model, ffn={"structure": "dense", "rank": None})


def weights_for_plain(config: Config, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the baseline's names; a gate is every other row of our fc1."""
    found = {}
    for name, weight in ours.items():
        name = name.replace("fc1", "up").replace("fc2", "down")
        if config.model.activation == "swiglu" and ".up." in name:
            found[name.replace(".up.", ".gate.")], found[name] = weight[0::2], weight[1::2]
        else:
            found[name] = weight
    if config.model.tie_embeddings:
        found["head.weight"] = found["embedding.weight"]
    return found


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_parameters_loss_and_gradients_are_those_of_our_dense_model(model: dict[str, Any]) -> None:
    """In float64, but for the rotation, which both do in float32."""
    torch.manual_seed(0)
    config = dense(model)
    ours, plain = GPT(config).double(), PlainGPT(config.model).double()
    assert sum(p.numel() for p in plain.parameters()) == total_parameters(config)
    with torch.no_grad():
        for parameter in ours.parameters():  # biases and norms, too
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain.load_state_dict(weights_for_plain(config, ours.state_dict()))
    rows = torch.randint(0, config.model.vocab_size, (3, 9))
    expected = cross_entropy(ours(rows[:, :-1]), rows[:, 1:])
    found = F.cross_entropy(plain(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    expected.backward()
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    gradients = weights_for_plain(config, {name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-6)


def test_recomputation_changes_nothing() -> None:
    config = dense({})
    torch.manual_seed(0)
    kept = PlainGPT(config.model)
    again = PlainGPT(config.model, recompute=True)
    again.load_state_dict(kept.state_dict())
    ids = torch.randint(0, 64, (2, 8))
    gradients = []
    for model in (kept, again):
        model(ids).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
