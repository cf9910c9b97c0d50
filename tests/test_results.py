"""docs/results.md against the records in docs/results, and the ratios of docs/performance.md."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from statistics import mean

import pytest

from megastruct.config import Config
from megastruct.config.load import load_config
from megastruct.metrics.records import read_runs
from megastruct.metrics.scaling import fit_scaling
from megastruct.planning.cost import forward_flops_per_token
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
    seen, largest_is_best = set(), set()
    for name, *cells in rows:
        said = {float(rate): loss for rate, loss in zip(header[1:], cells, strict=True) if loss}
        runs = [f"{name}_1", *(path.name for path in RECORDS.glob(f"{name}_rate_*"))]
        found = {recorded_config(run).optimizer.learning_rate: rounded(final_loss(run)) for run in runs}
        assert said == found, name
        assert min(said, key=lambda rate: said[rate]) == recorded_config(f"{name}_1").optimizer.learning_rate
        if min(said, key=lambda rate: said[rate]) == max(said):
            largest_is_best.add(name)
        configured = load_config(ROOT / "configs" / "run" / f"results_{name}.yaml")
        assert configured.optimizer == recorded_config(f"{name}_1").optimizer
        assert (configured.model, configured.ffn) == (
            recorded_config(f"{name}_1").model,
            recorded_config(f"{name}_1").ffn,
        )
        seen.add(name)
    assert len(seen) == 8
    assert len(largest_is_best) == 5 and "In five rows the best one is the largest that was tried" in PAGE


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


def test_equal_flops() -> None:
    runs = [path.name for path in RECORDS.glob("*_equal_flops_*")]
    steps = {}
    for run in runs:
        name = run.split("_equal_flops_")[0]
        config, dense = recorded_config(run), recorded_config("dense_muon_1" if name.endswith("_muon") else "dense_1")
        steps[name] = config.training.num_steps
        assert steps[name] == equal_flops_steps(config, dense), run
    assert steps.pop("blockdense") == steps.pop("blockdense_muon") == 2001
    assert set(steps.values()) == {2000}


def test_curves_of_rows_with_three_seeds() -> None:
    whole = {path.parent.name for path in RECORDS.glob("*/events.out.tfevents.*")}
    assert whole == {path.name.removesuffix("3") + "1" for path in RECORDS.glob("*_3")}
    for path in RECORDS.glob("*/metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps == [*range(200, steps[-1], 200), steps[-1]], path


def test_slopes() -> None:
    for kind, said in (("dense", "−0.0328 ± 0.0044 (dense)"), ("lowrank", "−0.0386 ± 0.0045\n(LowRank)")):
        runs = read_runs([str(path) for path in RECORDS.glob(f"width*_{kind}_1")])
        [fit] = fit_scaling(runs, "training_flops", "validation_loss")
        found = f"{fit.slope:.4f} ± {fit.slope_error:.4f}".replace("-", "−")
        assert said.startswith(found) and said in PAGE


def test_gains_of_guides() -> None:
    def gain(name: str) -> float:
        return mean(final_loss(f"{name}_{seed}") - final_loss(f"{name}_guided_{seed}") for seed in (1, 2, 3))

    assert f"guides gain {rounded(gain('lowrank'))} at equal steps" in PAGE
    assert f"guides cost {rounded(-gain('lowrank_muon'))} at equal steps" in PAGE


def test_ratios_of_a_step() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    rows = re.findall(r"^\| `(xl_\w+\.yaml)` \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|", page, re.M)
    dense_name, dense_speed = rows[0][0], int(rows[0][1].replace(",", ""))
    dense = forward_flops_per_token(load_config(ROOT / "configs" / "run" / dense_name))
    assert len(rows) == 4
    for name, speed, ratio, promise in rows[1:]:
        flops = forward_flops_per_token(load_config(ROOT / "configs" / "run" / name))
        assert ratio == f"{int(speed.replace(',', '')) / dense_speed:.2f}", name
        assert promise == f"{dense / flops:.2f}", name


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
