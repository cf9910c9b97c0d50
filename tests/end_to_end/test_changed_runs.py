"""Runs that are changed: made longer, branched, and trained with batch sizes that grow."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from forked import Forked, train_forked
from marks import soak
from megastruct.checkpoint.store import load_state, stored_names
from megastruct.run.origin import origin
from processes import Corpus, losses, read_metrics, write_config

CONSTANT = ("schedule.kind=constant", "schedule.warmup_steps=2")


def train(config: Path, tmp_path: Path, name: str, *overrides: str, ranks: int = 1) -> Path:
    run = tmp_path / "runs" / name
    train_forked(tmp_path, run, ranks, config, f"run.name={name}", *overrides)
    return run


def refusal(config: Path, tmp_path: Path, name: str, *overrides: str) -> str:
    with Forked(tmp_path, tmp_path / "runs" / name, 1, config, f"run.name={name}", *overrides) as forked:
        assert forked.codes() == [2], forked.text()
        return forked.text()


def contents(folder: Path) -> dict[str, Any]:
    """A hash and the time of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def steps_saved(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def stable(tmp_path_factory: Any, corpus: Corpus) -> Path:
    """12 steps, of which the last 4 decay, with every fourth checkpoint."""
    folder = tmp_path_factory.mktemp("stable")
    keys = ("schedule.kind=wsd", "schedule.warmup_steps=2", "schedule.decay=1-sqrt", "schedule.decay_steps=4")
    keep = ("checkpoint.interval_steps=2", "checkpoint.keep=1", "checkpoint.keep_every=4")
    run = train(write_config(folder, corpus), folder, "stable", *keys, *keep)
    assert steps_saved(run) == [4, 8, 12]
    return run


def test_a_decay_is_branched_off_a_stable_run(config: Path, tmp_path: Path, stable: Path, corpus: Corpus) -> None:
    """The branch makes the same steps as the run with a decay, bit for bit; the run stays as it is."""
    before = contents(stable)
    decay = ("schedule.kind=wsd", "schedule.warmup_steps=0", "schedule.decay=1-sqrt", "schedule.decay_fraction=1.0")
    decay += ("training.num_steps=4", f"run.from={stable}@8")
    run = train(config, tmp_path, "decay", *decay, "run.inherit=all", "checkpoint.interval_steps=2")
    assert [loss for _, loss in losses(run)] == [loss for _, loss in losses(stable)][8:]
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4]
    rates, wanted = ([record["learning_rate"] for record in read_metrics(one)] for one in (run, stable))
    assert rates == wanted[8:] and rates[0] < wanted[7]
    assert contents(stable) == before

    record = origin(run)
    assert record == {
        "kind": "run",
        "folder": str(stable),
        "step": 8,
        "inherit": "all",
        "optimizer": "adamw",
        "tokens": 8 * 8 * 32,
        "origin": None,
    }
    # A branch of the branch: weights alone, on other ranks, with another rate, batch, length of rows and data.
    mixture = f"data.path=[{{path: {corpus.text}, weight: 1}}]"
    other = (f"run.from={run}@2", "optimizer.learning_rate=1e-3", "training.global_batch_size=4", "run.seed=5")
    other += ("parallel.pp=2", "training.num_steps=2", "training.seq_length=16", "guided.schedule=fixedstep")
    other += ("data.kind=text", mixture, f"data.tokenizer={corpus.tokenizer}", "data.validation_fraction=0.1")
    again = train(config, tmp_path, "again", *other, "evaluation.num_samples=4", ranks=2)
    assert (origin(again) or {})["origin"] == record
    first = [read_metrics(one)[0]["loss"] for one in (stable, run, again)]
    assert first[2] < first[0] - 1.0, "the weights were not taken over"
    state = load_state(again / "checkpoints" / "step_00000002")
    assert (state["sample"], state["earlier_optimizer_steps"]) == (8, 0)


def test_a_branch_has_another_optimizer_and_one_of_it_the_first(config: Path, tmp_path: Path, stable: Path) -> None:
    """On one process, and back on two with ZeRO 3: the same weights, read on where the parent was."""
    keys = (*CONSTANT, "training.num_steps=4", "checkpoint.interval_steps=3", "optimizer.kind=muon")
    message = refusal(config, tmp_path, "muon", *keys, f"run.from={stable}@8", "run.inherit=all")
    assert f"muon, but the optimizer's state in {stable}/checkpoints/step_00000008 is that of adamw" in message
    assert "try: optimizer.kind=adamw, or run.inherit=data (its state starts anew)" in message
    message = refusal(config, tmp_path, "muon", *keys, f"run.from={stable}@8", "run.inherit=optimizer")
    assert "try: optimizer.kind=adamw, or run.inherit=weights (its state starts anew)" in message

    def summary() -> list[str]:
        return [line for line in (tmp_path / "rank0.log").read_text().splitlines() if line.startswith("parent ")]

    run = train(config, tmp_path, "muon", *keys, f"run.from={stable}@8", "run.inherit=data")
    anew = "their place in the data; the optimizer's state starts anew: the parent's is of"
    assert summary() == [f"parent    weights of {stable}@8, {anew} adamw"]
    assert losses(run)[0] == (1, losses(stable)[8][1])  # of the same weights on the same data
    state = load_state(run / "checkpoints" / "step_00000003")
    assert (state["optimizer"], state["sample"], state["earlier_optimizer_steps"]) == ("muon", 11 * 8, 0)

    layout = ("parallel.zero_stage=3", "optimizer.kind=adamw", "training.num_steps=2")
    back = train(config, tmp_path, "back", *keys, *layout, f"run.from={run}@3", "run.inherit=data", ranks=2)
    assert summary() == [f"parent    weights of {run}@3, {anew} muon"]
    assert losses(back)[0][1] == pytest.approx(losses(run)[3][1], abs=1e-5)
    record = origin(back) or {}
    assert (record["optimizer"], record["origin"]["optimizer"]) == ("muon", "adamw")
    names = stored_names(back / "checkpoints" / "step_00000002")
    assert not any(name.startswith("momentum.") for name in names)
    train(config, tmp_path, "back", *keys, *layout, f"run.from={run}@3", "run.inherit=data", ranks=2)
    assert summary() == []  # it has begun


def test_a_branch_goes_on_without_its_parent(config: Path, tmp_path: Path, stable: Path) -> None:
    """What it has taken over is its own checkpoint; the guides begin as what they guide, on two stages of two ranks."""
    parent = Path(shutil.copytree(stable, tmp_path / "parent"))
    keys = (f"run.from={parent}@8", "run.inherit=all", "training.num_steps=6", *CONSTANT, "parallel.pp=2")
    keys += ("guided.schedule=fixedstep", "parallel.tp=2", "checkpoint.keep=3")
    run = tmp_path / "runs" / "branch"
    with Forked(tmp_path, run, 4, config, "run.name=branch", *keys) as forked:
        forked.wait_for(lambda: (run / "checkpoints" / "step_00000000").exists())
    shutil.rmtree(parent)
    train(config, tmp_path, "branch", *keys, ranks=4)
    names = stored_names(run / "checkpoints" / "step_00000000")
    assert "master.blocks.1.mlp.fc1_guide.weight" in names
    assert load_state(run / "checkpoints" / "step_00000006")["earlier_optimizer_steps"] == 8
    assert losses(run)[0][1] == pytest.approx(losses(stable)[8][1], abs=1e-5)


def test_what_a_branch_may_not_change(config: Path, tmp_path: Path, stable: Path) -> None:
    message = refusal(config, tmp_path, "branch", f"run.from={stable}@7")
    assert f"has no checkpoint of step 7, only of 4, 8, 12\n    try: run.from={stable}@8" in message
    keys = (
        "model.num_attention_heads=2",
        "model.qk_norm=true",
        "ffn.rank=16",
        "run.seed=7",
        "data.validation_fraction=0.2",
    )
    message = refusal(config, tmp_path, "branch", f"run.from={stable}", *keys, "run.inherit=all")
    for line in (
        f"cannot branch from {stable}",
        f"model.num_attention_heads: 2, but {stable} has 4\n    try: model.num_attention_heads=4",
        f"model.qk_norm: True, but {stable} has False\n    try: model.qk_norm=False",
        f"ffn.rank: 16, but {stable} has 8\n    try: ffn.rank=8",
        f"run.seed: 7, but {stable} has 1234\n    try: run.seed=1234, or run.inherit=optimizer",
    ):
        assert line in message
    message = refusal(config, tmp_path, "branch", "run.from=s3://bucket/runs/stable@8")
    assert "run.from: s3://bucket/runs/stable@8 is an address" in message and "copy it to a folder" in message
    message = refusal(config, tmp_path, "stable", f"run.from={stable}@8", f"run.folder={stable.parent}")
    assert "run.from: " in message and "but the run was started with None" in message


@pytest.mark.parametrize("ranks", [1, soak(2)])
def test_a_finished_run_is_made_longer(config: Path, tmp_path: Path, ranks: int) -> None:
    """With a constant rate it is the run that was long from its start, bit for bit; a cosine is continued."""
    layout = f"parallel.pp={ranks}"
    long = train(config, tmp_path, "long", *CONSTANT, "training.num_steps=8", layout, ranks=ranks)
    train(config, tmp_path, "run", *CONSTANT, "training.num_steps=5", layout, ranks=ranks)
    run = train(config, tmp_path, "run", *CONSTANT, "training.num_steps=8", layout, ranks=ranks)
    assert losses(run) == losses(long)
    record = {"finished_steps": 5, "old_steps": 5, "new_steps": 8, "old_schedule_steps": 5, "schedule_steps": 8}
    record["schedule"] = "stretched"
    assert json.loads((run / "extensions.json").read_text()) == [record]
    message = refusal(config, tmp_path, "run", *CONSTANT, "training.num_steps=5")
    assert "training.num_steps: 5, but the run was started with 8" in message and f"run.from={run}" in message

    train(config, tmp_path, "run", *CONSTANT, "training.num_steps=10", "schedule.num_steps=8")
    assert json.loads((run / "extensions.json").read_text())[1]["schedule"] == "continued"


def test_a_run_whose_batch_grows_is_killed_and_resumed(config: Path, tmp_path: Path, corpus: Corpus) -> None:
    """Every sample is read once, in the order of a constant batch, from text too; the rate follows the tokens."""
    warmup = "training.batch_size_warmup=[{batch_size: 2, num_steps: 3}, {batch_size: 4, num_tokens: 512}]"
    text = ("data.kind=text", f"data.path={corpus.text}", f"data.tokenizer={corpus.tokenizer}")
    keys = (warmup, *text, "data.validation_fraction=0.1", "evaluation.num_samples=4", "schedule.unit=tokens")
    keys += (
        "checkpoint.interval_steps=2",
        "data.num_workers=0",
        f"evaluation.sources={{same: {corpus.tokens}, whole: {corpus.text}}}",
    )
    run = train(config, tmp_path, "undisturbed", *keys)
    records = read_metrics(run)
    samples = [2, 4, 6, 10, 14, 18, 22, *range(30, 71, 8)][:12]
    assert [record["tokens"] for record in records] == [32 * count for count in samples]
    flops = [record["training_flops"] for record in records]
    assert [value / flops[0] for value in flops] == pytest.approx([count / 2 for count in samples])
    state = load_state(run / "checkpoints" / "step_00000012")
    assert state["sample"] == samples[-1] and state["tokens"] == 32 * samples[-1]
    for record in records[5::6]:  # the tokens are of the same text, and hold out the same documents
        assert record["validation_loss/same"] == record["validation_loss"] != record["validation_loss/whole"]

    killed = tmp_path / "runs" / "killed"
    with Forked(tmp_path, killed, 1, config, "run.name=killed", *keys) as forked:
        forked.wait_for_step(5)
    train(config, tmp_path, "killed", *keys)
    assert losses(killed) == losses(run)
