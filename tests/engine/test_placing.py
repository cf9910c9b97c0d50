"""How a model's layers come to their place: what the ranks of a stage draw, and what a rank holds meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from configs import tiny_config
from host_memory import peak_extra_bytes
from megastruct.config.schema import Config
from megastruct.engine.engine import build_engine
from megastruct.engine.placing import Placing
from megastruct.models.gpt import GPT
from megastruct.models.mlp import MLP
from megastruct.structures.sharded import ShardedLayer, ShardedModule
from ranks import run_ranks
from runs import Layout, OwnWeights, own_weights, whole_weights

GUIDED = {"guided": {"schedule": "fixedstep"}}


def build(config: Config, layout: Layout) -> tuple[OwnWeights, int]:
    """A rank's weights, and how many parts of the model it has drawn."""
    drawn = 0
    for kind in (ShardedLayer, MLP):
        original = kind.draw_weights

        def counted(self: Any, names: Any, original: Any = original) -> dict[str, Tensor]:
            nonlocal drawn
            drawn += 1
            return original(self, names)

        kind.draw_weights = counted  # type: ignore[method-assign]
    return own_weights(build_engine(config, layout.topology, torch.device("cpu"))), drawn


@pytest.mark.parametrize(
    "layout", [Layout(1, 2, 2, 1), Layout(2, 2, 1, 0), Layout(1, 2, 2, 2), Layout(1, 1, 2, 3)], ids=str
)
def test_every_part_is_drawn_by_one_rank_of_its_stage(layout: Layout) -> None:
    config = tiny_config(parallel={"zero_stage": layout.zero}, training={"precision": "fp32"}, **GUIDED)
    ranks = run_ranks(layout.topology.world_size, build, config, layout)
    model = GPT(config)
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = whole_weights([weights for weights, _ in ranks])
    guides = {name: found.pop(name) for name in list(found) if "_guide" in name}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert guides and all(weight.any() for weight in guides.values())
    parts = sum(isinstance(module, ShardedModule) and ".mlp." not in name for name, module in model.named_modules())
    tied_again = int(layout.pp > 1 and config.model.tie_embeddings)
    assert sum(drawn for _, drawn in ranks) == parts + tied_again
    assert all(drawn for _, drawn in ranks)


LARGE = {"hidden_size": 1024, "num_layers": 12, "num_attention_heads": 8, "ffn_hidden_size": 4096, "vocab_size": 4096}


def peak_while_placing(config: Config, layout: Layout) -> int:
    bytes_ = 0
    original = Placing.__call__

    def measured(self: Placing, *arguments: Any) -> None:
        nonlocal bytes_
        torch.set_num_threads(1)
        bytes_ = peak_extra_bytes(lambda: original(self, *arguments))

    Placing.__call__ = measured  # type: ignore[method-assign]
    build_engine(config, layout.topology, torch.device("cpu"))
    return bytes_


def test_no_rank_holds_the_whole_model_in_fp32() -> None:
    """ZeRO 3 in bf16 over two ranks: a rank keeps a quarter of the model's fp32 bytes, and some parts meanwhile."""
    config = tiny_config(
        model={**LARGE, "init_std": 0.02},
        ffn={"structure": "dense", "rank": None},
        training={"precision": "bf16"},
        parallel={"zero_stage": 3},
    )
    whole = 4 * sum(parameter.numel() for parameter in GPT(config, init=False).parameters())
    layout = Layout(1, 2, 1, 3)
    peaks = run_ranks(layout.topology.world_size, peak_while_placing, config, layout)
    print(f"{whole / 2**20:.0f} MiB, peaks {[round(peak / 2**20) for peak in peaks]} MiB")
    assert max(peaks) < 0.7 * whole
