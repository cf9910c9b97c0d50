"""Batch sizes that grow, and what may change between configs: of a longer run, and of a branch."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs import tiny_config
from megastruct.config.checks import check_batch, cross_field_problems
from megastruct.config.compare import changes_of_a_branch, changes_of_the_run, extension
from megastruct.config.load import load_config
from megastruct.config.schema import TrainingConfig


def training(**keys: Any) -> TrainingConfig:
    return tiny_config(training=keys).training


@pytest.mark.parametrize(
    ("warmup", "sizes"),
    [
        (None, []),
        ([{"batch_size": 4, "num_steps": 3}, {"batch_size": 8, "num_tokens": 2 * 8 * 8}], [4, 4, 4, 8, 8]),
        ({"start": 4, "num_steps": 7}, [4, 4, 8, 8, 8, 12, 12]),
        ({"start": 8, "increment": 4, "num_tokens": 2 * 3 * 8 * 8}, [8, 8, 8, 12, 12]),
    ],
)
def test_the_batch_size_of_every_step(warmup: Any, sizes: list[int]) -> None:
    """The samples of a step begin where those of the step before end."""
    found = training(batch_size_warmup=warmup)
    assert [found.batch_sizes.at(step) for step in range(len(sizes) + 3)] == [*sizes, 16, 16, 16]
    for step in range(len(sizes) + 3):
        assert found.tokens(step) == 8 * sum([*sizes, 16, 16, 16][:step])
        tokens = training(batch_size_warmup=warmup, num_steps=None, num_tokens=max(1, found.tokens(step)))
        assert tokens.base_steps == max(1, step)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"batch_size_warmup": [{"batch_size": 3, "num_steps": 1}]},
            "batch_size 3 is not a multiple of micro_batch_size 2",
        ),
        ({"batch_size_warmup": {"start": 2, "increment": 3, "num_steps": 1}}, "increment 3 is not a multiple"),
        ({"batch_size_warmup": {"start": 4, "increment": 8, "num_steps": 1}}, "increments of 8 do not lead from 4 to"),
        ({"batch_size_warmup": [{"batch_size": 16, "num_steps": 1}]}, "do not grow"),
        ({"batch_size_warmup": [{"batch_size": 4}]}, "has neither num_steps nor num_tokens"),
        ({"batch_size_warmup": {"start": 4, "num_steps": 1, "num_tokens": 9}}, "num_steps and num_tokens are both set"),
    ],
)
def test_batch_sizes_that_cannot_be(keys: Any, message: str) -> None:
    problems = [str(problem) for problem in cross_field_problems(tiny_config(training=keys))]
    assert any(message in problem for problem in problems), problems


def test_the_layout_is_checked_against_every_batch_size() -> None:
    config = tiny_config(training={"batch_size_warmup": [{"batch_size": 4, "num_steps": 1}]})
    assert not list(check_batch(config, 2)) and "batch_size 4" in str(next(check_batch(config, 4)))


@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        ("schedule", {"kind": "cosin"}, "'cosin' is none of"),
        ("schedule", {"decay_steps": 3}, "schedule.decay_steps: 3, but schedule.kind is cosine"),
        (
            "schedule",
            {"kind": "wsd", "decay_steps": 3, "decay_fraction": 0.1},
            "set together with schedule.decay_steps",
        ),
        ("run", {"inherit": "all"}, "all, but there is no run.from"),
        ("evaluation", {"sources": {"books": "a"}}, "0 with evaluation.sources"),
        ("checkpoint", {"keep_every": 5}, "5 is not a multiple of checkpoint.interval_steps = 0"),
        ("checkpoint", {"keep_every": 5, "interval_steps": 2}, "5 is not a multiple of checkpoint.interval_steps = 2"),
    ],
)
def test_what_does_not_go_together(section: str, keys: Any, message: str) -> None:
    keys = {"name": "tiny", **keys} if section == "run" else keys
    problems = [str(problem) for problem in cross_field_problems(tiny_config(**{section: keys}))]
    assert any(message in problem for problem in problems), problems


GUIDED = {"guided": {"schedule": "fixedstep"}}


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ({}, {"training": {"num_steps": 30}}, []),
        ({}, {"training": {"num_steps": None, "num_tokens": 16 * 8 * 21}}, []),
        ({}, {"training": {"num_steps": 30}, "schedule": {"num_steps": 20}}, []),
        ({}, {"training": {"num_steps": 10}}, ["training.num_steps"]),
        ({}, {"schedule": {"num_steps": 10}}, ["schedule.num_steps"]),
        ({}, {"training": {"num_steps": 30, "seq_length": 16}}, ["training.num_steps", "training.seq_length"]),
        ({}, {"training": {"z_loss": 1e-4}, "model": {"qk_norm": True}}, ["model.qk_norm", "training.z_loss"]),
        (GUIDED, {**GUIDED, "training": {"num_steps": 30}}, ["training.num_steps"]),
    ],
)
def test_a_run_can_be_made_longer_and_nothing_else(old: Any, new: Any, changed: list[str]) -> None:
    configs = tiny_config(**old), tiny_config(**new)
    assert sorted(path for path, _, _ in changes_of_the_run(*configs)) == changed
    longer = extension(*configs)
    if not changed and longer:
        assert longer.schedule == ("continued" if "schedule" in new else "stretched")


@pytest.mark.parametrize(("before", "now", "said"), [(None, 20, "continued"), (30, 30, "continued")])
@pytest.mark.parametrize(("other", "said_then"), [(40, "stretched"), (10, "shortened")])
def test_a_schedule_continues_only_with_its_length(
    before: int | None, now: int, said: str, other: int, said_then: str
) -> None:
    """Whatever the length of the run is: 20 steps at first, then 30."""
    old, new, changed = (
        tiny_config(training={"num_steps": steps}, schedule={"num_steps": length})
        for steps, length in ((20, before), (30, now), (30, other))
    )
    assert [extension(old, config).schedule for config in (new, changed)] == [said, said_then]  # type: ignore[union-attr]


def test_what_a_branch_shares_with_its_parent() -> None:
    parent = tiny_config()
    other = {
        "model": {**parent.model.model_dump(), "rope_base": 5e5, "init_std": 0.1, "qk_norm": True},
        "training": {"seq_length": 16, "global_batch_size": 32, "z_loss": 1e-4},
        "optimizer": {"learning_rate": 1.0},
        "schedule": {"kind": "wsd"},
    }
    order = ["run.seed", "training.seq_length"]
    for inherit, keys in (("weights", []), ("optimizer", []), ("data", order), ("all", order)):
        branch = tiny_config(run={"name": "branch", "from": "tiny", "inherit": inherit, "seed": 5}, **other)
        assert sorted(path for path, _, _ in changes_of_a_branch(parent, branch)) == [
            "model.qk_norm",
            "model.rope_base",
            *keys,
        ]


def test_the_commands_of_the_page_are_valid() -> None:
    """Every command of docs/runs.md gives a config, and so do its batch sizes in YAML."""
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "runs.md").read_text()
    commands = [shlex.split(line, comments=True) for line in page.splitlines() if line.startswith("./launch.sh")]
    configs = [load_config(root / path, overrides) for _, path, *overrides in commands]
    assert {config.run.from_ for config in configs} == {None, "runs/s_lowrank_32@4000", "runs/stable@3000"}
    [example] = re.findall(r"```yaml\n(.*?)```", page, re.S)
    values = {**yaml.safe_load(example)["training"], "num_steps": 3000}
    assert training(**values).batch_sizes.sizes == (128, 256, 512)
    longer = [config for config in configs if config.training.num_tokens == 4_400_000_000]
    stretched, continued = (extension(configs[0], config) for config in longer)
    assert stretched and continued and (stretched.schedule, continued.schedule) == ("stretched", "continued")
    assert continued.schedule_steps == configs[0].training.base_steps
