"""The plan against models as built: parameters by stage, optimizer state, saved activations; and its own arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import tiny_config
from megastruct.commands import plan as plan_tool
from megastruct.config import load_config
from megastruct.config.schema import Config
from megastruct.errors import UserError
from megastruct.models.gpt import GPT
from megastruct.models.guidance import Guidance
from megastruct.models.loss import cross_entropy
from megastruct.planning.memory import (
    block_activation_bytes,
    guide_activation_bytes,
    memory_by_part,
    norm_activation_bytes,
    optimizer_bytes,
)
from megastruct.planning.plan import ffn_share, make_plan, suggest
from megastruct.planning.stages import pipeline_stages
from megastruct.planning.traffic import data_parallel_bytes, pipeline_bytes
from saved import saved_bytes

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "configs" / "run"

FFNS = {
    "dense": {"structure": "dense", "rank": None},
    "lowrank": {},
    "blockdense": {"structure": "blockdense", "nblocks": 4},
    "blockshuffle": {"structure": "blockshuffle", "nblocks": 4, "rank": None},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_parameters_by_stage_are_those_of_its_layers(pp: int, tied: bool) -> None:
    config = tiny_config(parallel={"pp": pp}, model={"tie_embeddings": tied})
    model = GPT(config)
    stages = pipeline_stages(config)
    for stage in stages:
        built = {
            p for layer in stage.layers if layer.name != "head" for p in model.get_submodule(layer.name).parameters()
        }
        if stage.has_head:
            built |= {model.embedding.weight} if tied else set(model.head.parameters())
        assert stage.parameters == sum(p.numel() for p in built)
    copies = model.embedding.weight.numel() if tied and pp > 1 else 0
    assert sum(stage.parameters for stage in stages) == sum(p.numel() for p in model.parameters()) + copies
    assert [layer.name for stage in stages for layer in stage.layers][-2:] == ["final_norm", "head"]


def test_weights_gradients_and_optimizer_of_a_step() -> None:
    config = tiny_config(parallel={"zero_stage": 0})
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters())
    cross_entropy(model(torch.zeros(1, 8, dtype=torch.int64)), torch.zeros(1, 8, dtype=torch.int64)).backward()
    optimizer.step()
    memory = memory_by_part(config, pipeline_stages(config)[0], dp_size=1)
    assert memory["weights"] == sum(p.nbytes for p in model.parameters())
    assert memory["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert memory["optimizer"] == sum(t.nbytes for t in moments)


@pytest.mark.parametrize(
    ("precision", "zero_stage", "bytes_per_parameter"),
    [  # weights, gradients, optimizer for 4 replicas
        ("fp32", 0, (4, 4, 8)),
        ("fp32", 1, (4, 4, 3)),
        ("bf16", 1, (2, 6, 3)),
        ("bf16", 2, (2, 1, 3)),
        ("bf16", 3, (0.5, 1, 3)),
    ],
)
def test_zero_stages(precision: str, zero_stage: int, bytes_per_parameter: tuple[float, ...]) -> None:
    config = tiny_config(training={"precision": precision}, parallel={"zero_stage": zero_stage})
    stage = pipeline_stages(config)[0]
    assert stage.parameters % 4 == 0
    memory = memory_by_part(config, stage, dp_size=4)
    found = tuple(memory[part] / stage.parameters for part in ("weights", "gradients", "optimizer"))
    assert found == bytes_per_parameter
    assert optimizer_bytes(config, {"matrix": 5}, dp_size=4) in (8 * 5, 12 * 2)  # an uneven share is rounded up


@pytest.mark.parametrize("ffn", sorted(FFNS))
@pytest.mark.parametrize("model", ["paper", "llama", "qk_norm"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_a_block_as_autograd_saves_them(ffn: str, model: str, precision: str) -> None:
    llama = {"norm": "rmsnorm", "activation": "swiglu", "bias": False, "head_dim": 6}
    models: dict[str, Any] = {"paper": {}, "llama": llama, "qk_norm": {"qk_norm": True, "num_key_value_heads": 2}}
    config = tiny_config(ffn=FFNS[ffn], model=models[model], training={"precision": precision})
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    block = GPT(config).to(dtype).blocks.get_submodule("1")
    x = torch.randn(8, 2, 16, dtype=dtype, requires_grad=True)  # [s, b, h]; made anew: it is an activation, too
    expected = 8 * 2 * block_activation_bytes(config, config.ffn.of_block(1))
    assert saved_bytes(lambda: block(x + 0), list(block.parameters())) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("ffn", ["lowrank", "blockdense", "blockshuffle"])
@pytest.mark.parametrize(("skip", "alpha"), [("rows", 0.75), ("none", 0.75)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_guides_as_autograd_saves_them(ffn: str, skip: str, alpha: float, precision: str) -> None:
    sections = {"ffn": FFNS[ffn], "training": {"precision": precision}, "model": {"hidden_size": 64}}
    config = tiny_config(**sections, guided={"schedule": "fixedstep", "levels": 4, "skip": skip})
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    guidance = Guidance(config, 1, 0, 1)
    guidance.start_step(0, alpha)
    block = GPT(config, guidance=guidance).to(dtype).blocks.get_submodule("1")
    choices = guidance.choices()[1]
    x = torch.randn(8, 2, 64, dtype=dtype, requires_grad=True)
    with_guides = saved_bytes(lambda: block(x + 0, choices), list(block.parameters()))
    expected = 8 * 2 * (block_activation_bytes(config, config.ffn.of_block(1)) + guide_activation_bytes(config))
    assert with_guides == pytest.approx(expected, rel=0.06)  # the rows' indices are not counted


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_what_guides_hold(zero_stage: int) -> None:
    """Four replicas, three guided blocks: weights, gradients, optimizer and buckets of 2 x 16 x 48 each."""
    guided = {"schedule": "fixedstep", "levels": 2, "skip": "none"}
    config = tiny_config(guided=guided, parallel={"zero_stage": zero_stage})
    [stage] = pipeline_stages(config)
    memory, weights = memory_by_part(config, stage, dp_size=4), 3 * 2 * 16 * 48
    bytes_per_weight = {0: 4 + 4 + 8 + 4, 1: 4 + 4 + 3 + 8, 2: 4 + 1 + 3 + 8, 3: 1 + 1 + 3 + 4 + 8}[zero_stage]
    assert memory["guides"] == weights * bytes_per_weight
    off = memory_by_part(tiny_config(parallel={"zero_stage": zero_stage}), stage, dp_size=4)
    assert {**memory, "guides": 0} == off


def test_activations_of_a_stage() -> None:
    """By hand: in-flight micro-batches fall along the pipeline; checkpointing keeps inputs and one block."""
    config = tiny_config(parallel={"pp": 2}, model={"tie_embeddings": False})
    first, last = pipeline_stages(config)
    assert (first.blocks, last.blocks) == ([0, 1], [2, 3])
    dense, lowrank = (block_activation_bytes(config, config.ffn.of_block(index)) for index in (0, 1))
    tokens = 2 * 8
    assert memory_by_part(config, first, 1)["activations"] == tokens * 2 * (dense + lowrank)
    assert memory_by_part(config, first, 8)["activations"] == tokens * 1 * (dense + lowrank)  # one micro-batch a step
    assert memory_by_part(config, last, 1)["activations"] == tokens * (2 * lowrank + norm_activation_bytes(config))
    assert memory_by_part(config, last, 1)["logits"] == tokens * 64 * 16
    again = tiny_config(parallel={"pp": 2}, training={"activation_checkpointing": True})
    assert memory_by_part(again, first, 1)["activations"] == tokens * (2 * 2 * 4 * 16 + lowrank)


@pytest.mark.parametrize(
    ("zero_stage", "gradients", "weights"), [(0, 6.0, 0.0), (1, 6.0, 1.5), (2, 12.0, 1.5), (3, 6.0, 6.0)]
)
def test_data_parallel_traffic(zero_stage: int, gradients: float, weights: float) -> None:
    """bf16, 4 replicas, 2 micro-batches a step: bytes per parameter of rings over four devices."""
    config = tiny_config(training={"precision": "bf16"}, parallel={"zero_stage": zero_stage})
    assert data_parallel_bytes(config, 1000, dp_size=4) == {"gradients": 1000 * gradients, "weights": 1000 * weights}
    assert data_parallel_bytes(config, 1000, dp_size=1) == {"gradients": 0, "weights": 0}


def test_pipeline_traffic() -> None:
    config = tiny_config(parallel={"pp": 4}, training={"precision": "bf16"})
    border = 2 * (16 * 8) * 16  # bf16, every token of a step, hidden size
    tied = 4 * 64 * 16
    found = [pipeline_bytes(config, stage, dp_size=1) for stage in pipeline_stages(config)]
    assert [(f["activations"], f["gradients"], f["tied_embedding"]) for f in found] == [
        (border, 0, tied),
        (border, border, 0),
        (border, border, 0),
        (0, border, tied),
    ]
    assert pipeline_bytes(config, pipeline_stages(config)[1], dp_size=2)["activations"] == border // 2


@pytest.mark.parametrize("size", ["s", "m", "l", "xl"])
@pytest.mark.parametrize("share", [63, 32])
def test_suggestions_come_near_the_papers(size: str, share: int) -> None:
    """LowRank and BlockShuffle get the published sizes, BlockDense the share itself (the published ones are off)."""
    config = load_config(RUNS / f"{size}_blockdense_{share}.yaml")
    found = {row["structure"]: row for row in suggest(config, share / 100)}
    for structure in ("lowrank", "blockshuffle"):
        published = load_config(RUNS / f"{size}_{structure}_{share}.yaml")
        assert found[structure] == {
            "structure": structure,
            **published.ffn.sizes,
            "share": ffn_share(config, published.ffn),
        }
    assert found["blockdense"]["nblocks"] == config.ffn.nblocks
    assert found["blockdense"]["share"] == pytest.approx(share / 100, rel=0.05)


def test_suggested_sizes_are_accepted() -> None:
    for share in (0.05, 0.32, 0.9):
        for row in suggest(load_config(RUNS / "m_wide_lowrank_63.yaml"), share):
            sizes = {key: row.get(key, "null") for key in ("structure", "rank", "nblocks")}
            load_config(RUNS / "m_wide_lowrank_63.yaml", [f"ffn.{key}={value}" for key, value in sizes.items()])
    with pytest.raises(UserError, match="--ffn-share: 32 is not between 0 and 1"):
        suggest(tiny_config(), 32)


def wide(**sections: dict[str, Any]) -> Config:
    model = {"hidden_size": 512, "ffn_hidden_size": 1024, "vocab_size": 1024}
    return tiny_config(**{**sections, "model": {**model, **sections.get("model", {})}})


@pytest.mark.parametrize(
    ("config", "num_devices", "warning"),
    [
        (wide(ffn={"rank": 128}), None, None),
        (wide(ffn={"rank": 200}), None, "try ffn.rank=256"),
        (wide(ffn={"rank": 128}, model={"vocab_size": 1000}), None, "try model.vocab_size=1024"),
        (wide(ffn={"structure": "blockdense", "rank": 128, "nblocks": 4}), None, "blocks of width 32"),
        (wide(ffn={"rank": 384}), None, "costs as much as the dense one"),
        (
            wide(ffn={"rank": 128}, training={"global_batch_size": 64}, parallel={"pp": 3}),
            3,
            "times the mean stage's FLOPs",
        ),
        (wide(ffn={"rank": 128}, parallel={"pp": 2}), 16, "stages idle 50% of the time"),
    ],
)
def test_warnings(config: Config, num_devices: int | None, warning: str | None) -> None:
    found = make_plan(config, num_devices)["warnings"]
    assert len(found) == (0 if warning is None else 1)
    assert warning is None or warning in found[0]


def test_layouts_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"parallel.pp: 3 processes do not divide"):
        make_plan(tiny_config(parallel={"pp": 2}), 3)
    with pytest.raises(UserError, match=r"global_batch_size: 16 is not a multiple of micro_batch_size 2 x dp 3"):
        make_plan(tiny_config(), 3)
    with pytest.raises(UserError, match="--num-gpus: 0 devices"):
        make_plan(tiny_config(), 0)


def test_tool(capsys: pytest.CaptureFixture[str]) -> None:
    main, path = plan_tool.main, str(RUNS / "xl_lowrank_32.yaml")
    main([path, "parallel.pp=4", "--num-gpus", "16", "--json", "--ffn-share", "0.32"])
    plan = json.loads(capsys.readouterr().out)
    assert round(plan["parameters"] / 1e6, 1) == 743.6 and round(plan["ffn_parameters"] / 1e6, 1) == 274.7
    assert round(plan["guided_fraction"], 3) == 0.432 and float(f"{plan['training_flops']:.2e}") == 1.29e20
    assert plan["layout"] == {"devices": 16, "pp": 4, "dp": 4, "tp": 1}
    assert sum(plan["flops_share"].values()) == pytest.approx(1.0)
    assert sum(stage["flops_share"] for stage in plan["stages"]) == pytest.approx(1.0)
    assert plan["memory_bytes"] == plan["stages"][0]["memory_bytes"]
    main([path, "parallel.pp=4", "--num-gpus", "16", "--ffn-share", "0.32"])
    text = capsys.readouterr().out
    assert "743.6 M" in text and "1.29e+20" in text and "ffn.structure=lowrank ffn.rank=512" in text
    assert max(len(line) for line in text.splitlines()) < 160
    main([str(RUNS / "xl_lowrank_32_guided.yaml"), "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert float(f"{plan['training_flops']:.2e}") == 2.10e20 and plan["steps"] == {"total": 69627, "guided": 20990}
    assert plan["memory_bytes"]["guides"] > plan["memory_bytes"]["weights"]
    main([str(RUNS / "xl_lowrank_32_guided.yaml")])
    assert "the first 20,990 of 69,627 guided" in capsys.readouterr().out
    main([str(RUNS / "m_wide_lowrank_63.yaml"), "--json", "--dense", str(RUNS / "m_gqa.yaml")])
    assert json.loads(capsys.readouterr().out)["guided_fraction"] == pytest.approx(0.40, abs=0.01)
    with pytest.raises(SystemExit) as stopped:
        main([path, "ffn.rank=9999"])
    assert stopped.value.code == 2
    assert "try: ffn.rank=1024" in capsys.readouterr().err


def test_steps_that_match_the_flops_of_another_run(capsys: pytest.CaptureFixture[str]) -> None:
    """A run of that length costs what the other one does, up to one step; the tool reports the length."""
    arguments = [str(RUNS / "s_lowrank_32.yaml"), "optimizer.kind=muon", "--match-flops", str(RUNS / "s_dense.yaml")]
    plan_tool.main([*arguments, "--json"])
    plan = json.loads(capsys.readouterr().out)
    steps = plan["match_flops"]["num_steps"]
    lengths = ["training.num_tokens=null", f"training.num_steps={steps}"]
    matched = make_plan(load_config(RUNS / "s_lowrank_32.yaml", lengths))["training_flops"]
    dense = make_plan(load_config(RUNS / "s_dense.yaml"))["training_flops"]
    assert steps > plan["steps"]["total"] and matched == pytest.approx(dense, rel=1 / steps)
    plan_tool.main(arguments)
    printed = capsys.readouterr().out
    assert f"training.num_steps={steps}, as s_dense" in printed and "optimizer FLOPs" in printed


def test_planning_loads_no_torch() -> None:
    code = "import megastruct.planning.plan, sys; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
