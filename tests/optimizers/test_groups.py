"""What groups of parameters may have of their own: learning rate, weight decay and beta2, with AdamW and Muon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from configs import tiny_config
from megastruct.config.checks import cross_field_problems
from megastruct.config.load import dump_config, load_config
from megastruct.config.schema import Config
from megastruct.engine.config import deepspeed_config
from megastruct.engine.optimizer import build_optimizer
from megastruct.errors import UserError
from megastruct.models.gpt import GPT
from megastruct.models.guidance import Guidance
from megastruct.optimizers import OPTIMIZERS, Precision, register
from megastruct.optimizers.registry import _optimizers
from sgd import SGD

OF_GROUPS: dict[str, Any] = {
    "factor_learning_rate_scale": 0.5,
    "vocabulary_weight_decay": 0.02,
    "vocabulary_beta2": 0.9,
    "vector_beta2": 0.8,
}
UNTIED = {"tie_embeddings": False}
GUIDED = {"schedule": "fixedstep", "levels": 2}


def config_with(kind: str = "adamw", **sections: Any) -> Config:
    optimizer = {"kind": kind, "learning_rate": 1e-2, **sections.pop("optimizer", {})}
    return tiny_config(optimizer=optimizer, **sections)


def groups_of(config: Config) -> dict[str, dict[str, Any]]:
    """The parameter group of every parameter, by name; each is in one."""
    guidance = Guidance(config, 1, 0, 1) if config.guided.schedule != "off" else None
    model = GPT(config, guidance=guidance)
    groups = build_optimizer(model, config, "cpu").param_groups
    found = {name: [g for g in groups if any(p is q for q in g["params"])] for name, p in model.named_parameters()}
    assert all(len(own) == 1 for own in found.values())
    return {name: own for name, [own] in found.items()}


def kind_of(name: str) -> str:
    if "embedding" in name or "head" in name:
        return "vocabulary"
    if "_guide" in name:
        return "guide"
    if "norm" in name or name.endswith("bias"):
        return "vector"
    return "dense" if name.endswith(".weight") else "factor"


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_treated_as_its_keys_say(kind: str) -> None:
    config = config_with(kind, optimizer=OF_GROUPS, model=UNTIED, guided=GUIDED)
    groups = groups_of(config)
    assert {kind_of(name) for name in groups} == {"vocabulary", "guide", "vector", "dense", "factor"}
    beta2 = OPTIMIZERS[kind].settings({})["beta2"]
    for name, group in groups.items():
        what = kind_of(name)
        assert group["lr_scale"] == (0.5 if what == "factor" else 1.0), name
        assert group["weight_decay"] == {"vector": 0.0, "vocabulary": 0.02}.get(what, 0.1), name
        if group["name"] != "matrices" or kind == "adamw":
            assert group["betas"] == (0.9, {"vector": 0.8, "vocabulary": 0.9}.get(what, beta2)), name


def test_scales_are_multiplied() -> None:
    """The scale of factors with those of a width and of AdamW's half; the decay of a step is that of factors alone."""
    keys = {**OF_GROUPS, "adamw_learning_rate_scale": 0.25}
    for kind, scale in (("adamw", 32 / 8), ("muon", (32 / 8 * 1) ** 0.5)):
        own = keys if kind == "muon" else OF_GROUPS
        groups = groups_of(config_with(kind, optimizer=own, model={"base_width": 32}))
        u, dense = groups["blocks.1.mlp.fc1.u"], groups["blocks.0.mlp.fc2.weight"]  # u: [48, 8], fan-in 8
        assert u["lr_scale"] == pytest.approx(0.5 * scale)
        assert u["lr_scale"] * u["weight_decay"] == pytest.approx(0.5 * 0.1)
        assert dense["lr_scale"] * dense["weight_decay"] == pytest.approx(0.1)
        of_words = 0.25 if kind == "muon" else 1.0
        assert groups["embedding.weight"]["lr_scale"] == of_words
        assert groups["embedding.weight"]["weight_decay"] == 0.02


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("base_width", [None, 32])
def test_keys_that_say_the_same_as_without_them_make_the_same_groups(kind: str, base_width: int | None) -> None:
    """ZeRO lays out its partitions by group, so that the sums of a norm depend on how many there are."""
    beta2 = OPTIMIZERS[kind].settings({})["beta2"]
    same = {"factor_learning_rate_scale": 1.0, "vocabulary_weight_decay": 0.1}
    same |= {"vocabulary_beta2": beta2, "vector_beta2": beta2}
    found = []
    for keys in ({}, same):
        config = config_with(kind, optimizer=keys, model={"base_width": base_width})
        model = GPT(config)
        names = {p: name for name, p in model.named_parameters()}
        groups = build_optimizer(model, config, "cpu").param_groups
        found.append([{**group, "params": [names[p] for p in group["params"]]} for group in groups])
    assert found[0] == found[1]
    names = [group["name"] for group in found[0]]
    if base_width is None:
        wanted = {"adamw": ["matrices", "vectors"], "muon": ["matrices", "vocabulary", "vectors"]}
        assert names == wanted[kind]


def test_adamw_steps_each_group_by_its_own_values() -> None:
    """Three steps of every parameter, against torch's AdamW for it alone."""
    config = config_with("adamw", optimizer=OF_GROUPS, model=UNTIED)
    model = GPT(config)
    optimizer = build_optimizer(model, config, "cpu")
    alone = {}
    for name, p in model.named_parameters():
        what, copy = kind_of(name), nn.Parameter(p.detach().clone())
        decay = {"vector": 0.0, "vocabulary": 0.02}.get(what, 0.1)
        beta2 = {"vector": 0.8, "vocabulary": 0.9}.get(what, 0.999)
        rate = 5e-3 if what == "factor" else 1e-2
        alone[name] = (copy, torch.optim.AdamW([copy], lr=rate, betas=(0.9, beta2), weight_decay=decay))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * group["lr_scale"]
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            alone[name][0].grad = p.grad.clone()
        optimizer.step()
        for name, p in model.named_parameters():
            alone[name][1].step()
            torch.testing.assert_close(p.detach(), alone[name][0].detach(), atol=1e-7, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("sections", "where", "suggestion"),
    [
        ({"ffn": {"structure": "dense", "rank": None}}, "factor_learning_rate_scale", "ffn.structure=lowrank"),
        ({"model": {"num_layers": 1}}, "factor_learning_rate_scale", "ffn.dense_first_block=false"),
    ],
)
def test_factors_that_are_not_there_are_refused(sections: Any, where: str, suggestion: str) -> None:
    [problem] = cross_field_problems(config_with(optimizer={"factor_learning_rate_scale": 0.5}, **sections))
    assert problem.where == f"optimizer.{where}" and suggestion in problem.suggestion
    assert not cross_field_problems(config_with(**sections))


def test_one_structured_block_is_enough() -> None:
    keys = {"factor_learning_rate_scale": 0.5}
    assert not cross_field_problems(config_with(optimizer=keys, model={"num_layers": 2}))
    one = {"structure": "lowrank", "rank": 8, "dense_first_block": False}
    assert not cross_field_problems(config_with(optimizer=keys, model={"num_layers": 1}, ffn=one))


def test_a_run_from_before_the_keys_is_the_same_run(tmp_path: Path) -> None:
    """Its config.yaml lacks them; one that has them is read back as it was."""
    plain, own = config_with("muon"), config_with("muon", optimizer=OF_GROUPS)
    for config in (plain, own):
        (tmp_path / "config.yaml").write_text(dump_config(config))
        assert load_config(tmp_path / "config.yaml") == config
    lines = [line for line in dump_config(plain).splitlines() if not any(f"  {key}:" in line for key in OF_GROUPS)]
    (tmp_path / "old.yaml").write_text("\n".join(line for line in lines if "coefficients" not in line))
    assert load_config(tmp_path / "old.yaml") == plain


# -- what DeepSpeed would do by itself
@pytest.fixture
def third() -> Iterator[dict[str, Any]]:
    """An optimizer of another package, of which a test says what it builds."""
    builds: dict[str, Any] = {}

    class Third(SGD):
        name = "third"

        def build(
            self, groups: list[dict[str, Any]], settings: Any, device_type: str, precision: Precision
        ) -> torch.optim.Optimizer:
            return builds["make"](groups)

    register(Third())
    yield builds
    del _optimizers["third"]


def test_an_optimizer_for_which_deepspeed_runs_its_own_muon_is_refused(third: dict[str, Any]) -> None:
    """It would orthogonalise before it clips, and every shard by itself: no error, only wrong weights."""

    class MyMuon(torch.optim.SGD):
        pass

    third["make"] = lambda groups: MyMuon(groups)
    config = config_with("third")
    model = GPT(config)
    build_optimizer(model, config, "cpu")  # without marks on parameters DeepSpeed leaves it alone
    for parameter in model.parameters():
        parameter.use_muon = parameter.ndim == 2
    with pytest.raises(TypeError, match="DeepSpeed runs a Muon of its own for MyMuon"):
        build_optimizer(model, config, "cpu")
    third["make"] = lambda groups: torch.optim.SGD(groups)
    build_optimizer(model, config, "cpu")


@pytest.mark.soak  # the import compiles kernels
def test_deepspeeds_own_muon_is_refused(third: dict[str, Any]) -> None:
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    def deepspeeds(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return MuonWithAuxAdam([{"params": g["params"], "lr": 1e-2, "use_muon": False} for g in groups])

    third["make"], config = deepspeeds, config_with("third")
    with pytest.raises(TypeError, match="for MuonWithAuxAdam"):
        build_optimizer(GPT(config), config, "cpu")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_is_given_no_optimizer_of_its_own(kind: str, zero_stage: int, precision: str) -> None:
    """By these sections of its config it would choose, clip or offload for itself."""
    config = config_with(kind, training={"precision": precision}, parallel={"zero_stage": zero_stage})
    values = deepspeed_config(config, 1, 1000)
    assert "optimizer" not in values and "scheduler" not in values
    assert values["zero_optimization"].keys() == {"stage", "reduce_bucket_size"}


@pytest.mark.parametrize(
    "text",
    [
        "deepspeed: {optimizer: {type: Muon}}",
        "optimizer: {use_muon: true}",
        "optimizer: {ns_method: gram}",
        "optimizer: {muon_lr: 1.0}",
        "parallel: {zero_optimization: {reduce_scatter: false}}",
    ],
)
def test_no_config_reaches_them(tmp_path: Path, text: str) -> None:
    (tmp_path / "base.yaml").write_text(dump_config(config_with("muon")))
    (tmp_path / "run.yaml").write_text(f"include: base.yaml\n{text}\n")
    with pytest.raises(UserError, match="unknown"):
        load_config(tmp_path / "run.yaml")
