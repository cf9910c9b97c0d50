"""What a block holds with each `training.activation_checkpointing`, by the CPU's allocator, against the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from configs import tiny_config
from megastruct.models.gpt import GPT
from megastruct.models.guidance import Guidance
from megastruct.planning.memory import (
    block_activation_bytes,
    kept_block_bytes,
    kept_guide_bytes,
    memory_by_part,
    value_bytes,
)
from megastruct.planning.stages import pipeline_stages
from saved import held_bytes

FFNS: dict[str, dict[str, Any]] = {
    "dense": {"structure": "dense", "rank": None},
    "lowrank": {},
    "blockdense": {"structure": "blockdense", "nblocks": 4},
    "blockshuffle": {"structure": "blockshuffle", "nblocks": 4, "rank": None},
}
MODELS: dict[str, dict[str, Any]] = {
    "paper": {},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "bias": False, "head_dim": 6},
    "qk_norm": {"qk_norm": True, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("ffn", sorted(FFNS))
@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_block_holds(ffn: str, model: str, precision: str) -> None:
    """On 16 tokens; its input and its output are of width 16."""
    held, planned = [], []
    for recompute in (False, "selective", True):
        training = {"precision": precision, "activation_checkpointing": recompute}
        config = tiny_config(ffn=FFNS[ffn], model=MODELS[model], training=training)
        block = GPT(config).to(torch.bfloat16 if precision == "bf16" else torch.float32).blocks.get_submodule("1")
        x = torch.randn(8, 2, 16, dtype=next(block.parameters()).dtype, requires_grad=True)
        held.append(held_bytes(lambda block=block, x=x: block(x + 0)))  # type: ignore[misc]
        border, ffn_config = value_bytes(config) * 16, config.ffn.of_block(1)
        of_block = {
            False: block_activation_bytes(config, ffn_config),  # its input is that of the first norm
            "selective": border + kept_block_bytes(config, ffn_config),
            True: border,
        }[recompute]
        planned.append(16 * (of_block + border))
    assert held == pytest.approx(planned, rel=0.02)
    assert held[0] > held[1] > held[2]


@pytest.mark.parametrize("skip", ["rows", "none"])
def test_what_guides_add(skip: str) -> None:
    """In the step with the largest share of the rows: 3 of 4."""
    training = {"activation_checkpointing": "selective"}
    sections = {"ffn": FFNS["lowrank"], "training": training, "model": {"hidden_size": 64}}
    config = tiny_config(**sections, guided={"schedule": "fixedstep", "levels": 4, "skip": skip})
    guidance = Guidance(config, 1, 0, 1)
    guidance.start_step(0, 0.75)
    models = GPT(config, guidance=guidance), GPT(tiny_config(**sections))
    blocks = [model.blocks.get_submodule("1") for model in models]
    choices = guidance.choices()[1]
    x = torch.randn(8, 2, 64, requires_grad=True)
    with_guides, without = held_bytes(lambda: blocks[0](x + 0, choices)), held_bytes(lambda: blocks[1](x + 0))
    assert with_guides - without == pytest.approx(16 * kept_guide_bytes(config), rel=0.02)


def test_a_stage() -> None:
    """By hand: two micro-batches are under way; one block of them runs again as a whole."""
    parallel, model = {"pp": 2}, {"tie_embeddings": False}
    by_value = {}
    for recompute in (False, "selective", True):
        config = tiny_config(parallel=parallel, model=model, training={"activation_checkpointing": recompute})
        by_value[recompute] = memory_by_part(config, pipeline_stages(config)[0], 1)["activations"]
    blocks = [config.ffn.of_block(index) for index in (0, 1)]
    again = max(block_activation_bytes(config, ffn) for ffn in blocks)
    kept = sum(4 * 16 + kept_block_bytes(config, ffn) for ffn in blocks)
    assert by_value["selective"] == 2 * 8 * (2 * kept + again)
    assert by_value[True] < by_value["selective"]
