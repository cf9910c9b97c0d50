"""docs/results.md against the records in docs/results."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from statistics import mean

import pytest

from megastruct.config import Config
from megastruct.config.load import load_config
from megastruct.planning.steps import equal_flops_steps

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "docs" / "results"
PAGE = (ROOT / "docs" / "results.md").read_text()


@cache
def final_loss(run: str) -> float:
    """The validation loss after the last step of a run, which has taken all the steps of its config."""
    last = json.loads((RECORDS / run / "metrics.jsonl").read_text().splitlines()[-1])
    config = recorded_config(run)
    assert last["step"] >= config.training.base_steps
    return float(last["validation_loss"])


@cache
def recorded_config(run: str) -> Config:
    return load_config(RECORDS / run / "config.yaml")


def table(heading: str, first_cell: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table under a heading whose first column has this name."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.search(rf"^\| {first_cell} \|.*\n\|[-|]+\n((?:\|.*\n)+)", section, re.M)
    assert found
    lines = [line.strip("|").split("|") for line in (found[0].splitlines()[0], *found[1].splitlines())]
    header, *rows = [[cell.strip(" *") for cell in line] for line in lines]
    return header, rows


def rounded(value: float) -> str:
    return f"{value:.3f}"


def test_losses_by_learning_rate() -> None:
    header, rows = table("Learning rates", "run")
    seen = set()
    for name, *cells in rows:
        said = {float(rate): loss for rate, loss in zip(header[1:], cells, strict=True) if loss}
        runs = [f"{name}_1", *(path.name for path in RECORDS.glob(f"{name}_rate_*"))]
        found = {recorded_config(run).optimizer.learning_rate: rounded(final_loss(run)) for run in runs}
        assert said == found, name
        assert min(said, key=lambda rate: said[rate]) == recorded_config(f"{name}_1").optimizer.learning_rate
        configured = load_config(ROOT / "configs" / "run" / f"results_{name}.yaml")
        assert configured.optimizer == recorded_config(f"{name}_1").optimizer
        assert (configured.model, configured.ffn) == (
            recorded_config(f"{name}_1").model,
            recorded_config(f"{name}_1").ffn,
        )
        seen.add(name)
    assert len(seen) == 8


def test_other_values_of_the_optimizer() -> None:
    section = PAGE.split("| run | loss | beside |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (\w[\w.]*) \| ([\d.]+) \| ([\d.]+),", section, re.M)
    assert len(rows) == 4
    for run, loss, beside in rows:
        name = re.sub("_(beta2|adamw)_.*", "", run)
        rate = recorded_config(run).optimizer.learning_rate
        base = f"{name}_rate_{rate:g}" if (RECORDS / f"{name}_rate_{rate:g}").exists() else f"{name}_1"
        assert recorded_config(base).optimizer.learning_rate == rate
        assert (loss, beside) == (rounded(final_loss(run)), rounded(final_loss(base))), run


@pytest.mark.parametrize("heading", ["Dense and structured models", "When self-guided training pays"])
def test_losses_of_three_seeds(heading: str) -> None:
    header, rows = table(heading, "run")
    assert header[1:] == ["seed 1", "seed 2", "seed 3", "mean"]
    for name, *seeds, average in rows:
        runs = sorted(path.name for path in RECORDS.glob(f"{name}_[123]"))
        assert [recorded_config(run).run.seed for run in runs] == list(range(1, len(runs) + 1))
        assert [seed for seed in seeds if seed] == [rounded(final_loss(run)) for run in runs], name
        assert average == rounded(mean(final_loss(run) for run in runs)), name


def test_losses_by_width() -> None:
    _, rows = table("Larger models", "width")
    for width, blocks, steps, *cells, difference in rows:
        found = []
        for kind in ("dense", "lowrank"):
            for seed in (1, 2):
                run = f"width{width}_{kind}_{seed}"
                found.append(rounded(final_loss(run)) if (RECORDS / run).exists() else "")
        assert cells == found
        dense, lowrank = (recorded_config(f"width{width}_{kind}_1") for kind in ("dense", "lowrank"))
        assert dense.model == lowrank.model
        assert (dense.model.hidden_size, dense.model.num_layers) == (int(width), int(blocks))
        assert lowrank.training.num_steps == int(steps.replace(",", "")) == equal_flops_steps(lowrank, dense)
        gap = final_loss(f"width{width}_lowrank_1") - final_loss(f"width{width}_dense_1")
        assert difference.replace("−", "-") == f"{gap:+.3f}"


def test_no_record_is_left_out() -> None:
    named = set()
    for name, *_ in table("Learning rates", "run")[1]:
        named |= {path.name for path in RECORDS.glob(f"{name}_rate_*")}
    named |= set(re.findall(r"^\| (\w+_(?:beta2|adamw)_[\d.]+) \|", PAGE, re.M))
    for heading in ("Dense and structured models", "When self-guided training pays"):
        for name, *_ in table(heading, "run")[1]:
            named |= {path.name for path in RECORDS.glob(f"{name}_[123]")}
    named |= {path.name for path in RECORDS.glob("width*")}
    assert {path.name for path in RECORDS.iterdir() if path.is_dir()} == named
