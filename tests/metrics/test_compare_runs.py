"""Axes, scaling fits and tables of tools/plot_runs.py, the sums of what runs cost, and TensorBoard's order."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import tiny_config
from megastruct.commands import plot_runs
from megastruct.config.load import dump_config, load_config
from megastruct.metrics.records import grouped, read_runs
from megastruct.metrics.scaling import fit_scaling
from megastruct.metrics.spent import Spent
from megastruct.metrics.writers import TENSORBOARD_TAGS, MetricWriter
from megastruct.planning.cost import ffn_parameters, total_parameters, training_flops_per_token

LOWRANK: dict[str, Any] = {"structure": "lowrank", "rank": 8, "dense_first_block": False}
DENSE: dict[str, Any] = {"structure": "dense", "rank": None}
ROOT = Path(__file__).resolve().parents[2]


def write_run(
    folder: Path,
    name: str,
    ffn: dict[str, Any],
    losses: list[float],
    hidden: int = 16,
    spent: bool = True,
    **sections: dict[str, Any],
) -> Path:
    """The folder of a finished run, with a record for each loss; `spent`: it knows what it cost."""
    run = folder / name
    run.mkdir(parents=True)
    sections = {"training": {"num_steps": max(1, len(losses))}, **sections}
    model = {"hidden_size": hidden, "ffn_hidden_size": 3 * hidden}
    config = tiny_config(run={"name": name}, ffn=ffn, model=model, **sections)
    (run / "config.yaml").write_text(dump_config(config))
    writer = MetricWriter(run, 0, {})
    tokens = config.training.tokens_per_step
    sums = Spent(2, tokens * training_flops_per_token(config), 0.0, {}, 0)
    for step, loss in enumerate(losses, start=1):
        sums.step(0.0)
        cost = sums.read() if spent else {}
        writer.write(step, {"loss": loss, "validation_loss": loss, "tokens": step * tokens, **cost})
    writer.close()
    return run


@pytest.mark.parametrize("spent", [True, False])
def test_axes(tmp_path: Path, spent: bool) -> None:
    """Training FLOPs of a run of before they were recorded come from its config."""
    run = write_run(tmp_path, "lowrank", LOWRANK, [4.0, 3.0], spent=spent)
    config = tiny_config(ffn=LOWRANK)
    flops = config.training.tokens_per_step * training_flops_per_token(config)
    [found] = read_runs([str(run)])
    assert found.points("training_flops", "validation_loss") == [(flops, 4.0), (2 * flops, 3.0)]
    assert found.points("step", "loss") == [(1, 4.0), (2, 3.0)]
    assert bool(found.points("wall_time_seconds", "loss")) == spent


def test_a_record_of_a_validation_alone_has_its_place(tmp_path: Path) -> None:
    """Earlier runs wrote no tokens where they validated between two logged steps."""
    run = write_run(tmp_path, "dense", DENSE, [], training={"num_steps": 8})
    (run / "metrics.jsonl").write_text('{"step": 3, "validation_loss": 4.0}\n')
    [found] = read_runs([str(run)])
    tokens = 3 * tiny_config().training.tokens_per_step
    assert found.points("tokens", "validation_loss") == [(tokens, 4.0)]
    assert found.points("training_flops", "validation_loss")[0][1] == 4.0


def test_the_runs_of_the_paper_are_grouped_over_their_sizes(tmp_path: Path) -> None:
    """The sizes of BlockDense round to other shares of the dense weights in every second model."""
    arguments = []
    for path in sorted((ROOT / "configs" / "run").glob("*_*_??*.yaml")):
        if "wide" not in path.name:
            run = tmp_path / path.stem
            run.mkdir()
            (run / "config.yaml").write_text(dump_config(load_config(path)))
            (run / "metrics.jsonl").write_text("")
            arguments.append(str(run))
    groups = {group: {run.name for run in members} for group, members in grouped(read_runs(arguments)).items()}
    for structure, share, called in (("blockdense", 32, 30), ("blockdense", 63, 61), ("lowrank", 32, 31)):
        assert groups[f"{structure} {called} %"] == {f"{size}_{structure}_{share}" for size in ("s", "m", "l", "xl")}
    assert "s_lowrank_32_guided" in groups["lowrank 31 %, guided"]
    assert groups["lowrank 31 %, muon"] == {f"{size}_lowrank_32_muon" for size in ("s", "m", "l", "xl")}


def test_every_axis_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path, "dense", DENSE, [4.0, 3.0])), str(write_run(tmp_path, "low", LOWRANK, [4.0, 3.5]))]
    for x in ("tokens", "steps", "wall_time", "training_flops", "gpu_hours"):
        output = tmp_path / f"{x}.png"
        plot_runs.main([*runs, "--x", x, "--output", str(output)])
        assert output.stat().st_size > 10_000
    old = str(write_run(tmp_path, "old", DENSE, [4.0], spent=False))
    with pytest.raises(SystemExit):
        plot_runs.main([old, "--x", "wall_time"])
    assert "--x: no run has wall_time_seconds" in capsys.readouterr().err


def test_a_fit_against_numpy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for name, ffn, factor in (("dense", DENSE, 1.0), ("low", LOWRANK, 1.02)):
        for hidden, noise in ((16, 0.01), (32, -0.02), (64, 0.0), (128, 0.01)):
            loss = factor * (1 + noise) * 6.0 * hidden**-0.1
            ffn = {**ffn, "rank": hidden // 2} if ffn["rank"] else ffn
            runs.append(str(write_run(tmp_path, f"{name}{hidden}", ffn, [9.0, loss], hidden)))
    fits = fit_scaling(read_runs(runs), "training_flops", "validation_loss")
    assert [fit.group for fit in fits] == ["dense", "lowrank 67 %"]
    for fit in fits:
        (slope, intercept), covariance = np.polyfit(*np.log(np.array(fit.points)).T, 1, cov=True)
        assert fit.slope == pytest.approx(slope) and fit.intercept == pytest.approx(intercept)
        assert fit.slope_error == pytest.approx(math.sqrt(covariance[0, 0]))
        assert fit.loss(fit.points[0][0]) == pytest.approx(fit.points[0][1], rel=0.05)
    plot_runs.main([*runs, "--fit", "--output", str(tmp_path / "fit.png")])
    printed = capsys.readouterr().out
    assert f"| dense | 4 | {fits[0].slope:.4f} | {fits[0].slope_error:.4f} |" in printed
    assert (tmp_path / "fit.png").stat().st_size > 10_000
    named = [f"all={run}" for run in runs]
    [fit] = fit_scaling(read_runs(named), "training_flops", "validation_loss")
    assert fit.group == "all" and len(fit.points) == 8
    with pytest.raises(SystemExit) as stopped:
        plot_runs.main([*runs[:2], *runs[4:], "--fit"])
    assert stopped.value.code == 2
    assert "dense has 2 of the 3 sizes" in capsys.readouterr().err


def test_a_fit_over_parameters_is_that_of_a_power_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for hidden in (16, 32, 64):
        sizes = {"hidden_size": hidden, "ffn_hidden_size": 3 * hidden}
        loss = 8 * total_parameters(tiny_config(ffn=DENSE, model=sizes)) ** -0.25
        runs.append(str(write_run(tmp_path, f"d{hidden}", DENSE, [loss], hidden)))
    plot_runs.main([*runs, "--fit", "--x", "parameters", "--output", str(tmp_path / "fit.png")])
    assert "| dense | 3 | -0.2500 | 0.0000 |" in capsys.readouterr().out


def test_runs_that_cannot_be_fitted_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    early = write_run(tmp_path, "early", DENSE, [4.0], training={"num_steps": 8})
    plain = write_run(tmp_path, "plain", DENSE, [])
    with pytest.raises(SystemExit) as stopped:
        plot_runs.main([str(early), str(plain), "--fit"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"{early}: its last validation_loss is that of step 1 of 8" in error
    assert f"{plain}: no positive training_flops and validation_loss in its last record" in error


def test_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known, old = write_run(tmp_path, "low", LOWRANK, [4.0, 3.0]), write_run(tmp_path, "old", LOWRANK, [], spent=False)
    (old / "config.yaml").unlink()
    plot_runs.main([str(known), str(old), "--table"])
    header, _, row, unknown = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    config = tiny_config(ffn=LOWRANK)
    tokens = 2 * config.training.tokens_per_step
    assert header.startswith("| run | parameters | FFN parameters | tokens | training FLOPs | GPU hours |")
    assert cells[:2] == ["low", f"{total_parameters(config) / 1e6:.2f} M"]
    assert cells[2:5] == [
        f"{ffn_parameters(config) / 1e6:.2f} M",
        f"{tokens / 1e6:.2f} M",
        f"{tokens * training_flops_per_token(config):.3g}",
    ]
    assert float(cells[5]) < 0.01 and cells[6:] == ["3.0000", f"{math.exp(3):.2f}"]
    assert unknown == "| old | – | – | – | – | – | – | – |"
    with pytest.raises(SystemExit) as stopped:
        plot_runs.main([str(known), "--table", "--x", "steps"])
    assert stopped.value.code == 2 and "--table: has fixed columns" in capsys.readouterr().err


def test_the_cost_in_a_table_is_that_up_to_its_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, "low", LOWRANK, [4.0], training={"num_steps": 8})
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "tokens": 10**9, "training_flops": 1e20, "loss": 3.0}) + "\n")
    plot_runs.main([str(run), "--table"])
    row = capsys.readouterr().out.splitlines()[-1]
    assert " B |" not in row and "1e+20" not in row and row.endswith("| 4.0000 | 54.60 |")


def test_the_commands_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs", "quickstart", LOWRANK, [4.0, 3.0])
    for hidden, size in ((16, "s"), (32, "m"), (64, "l")):
        write_run(tmp_path / "runs", f"{size}_dense", DENSE, [4.0, 60 / hidden], hidden)
        write_run(tmp_path / "runs", f"{size}_lowrank_32", {**LOWRANK, "rank": hidden // 4}, [4.0, 61 / hidden], hidden)
    section = (ROOT / "docs" / "use_the_model.md").read_text().split("\n## Compare runs\n")[1].split("\n## ")[0]
    lines = [line for block in re.findall(r"```bash\n(.*?)```", section, re.DOTALL) for line in block.splitlines()]
    commands = [words for line in lines if (words := shlex.split(line, comments=True))]
    printed = []
    for python, program, *arguments in commands:
        assert (python, program) == (".venv/bin/python", "tools/plot_runs.py")
        plot_runs.main(arguments)
        printed.append(capsys.readouterr().out)
    curves, table, *fits = printed
    assert curves == "curves.png\n" and table.splitlines()[2].startswith("| quickstart | ")
    for fit, x in zip(fits, ("training_flops", "parameters"), strict=True):
        assert fit.startswith(f"| structure | sizes | slope over {x} |")
        assert "| dense | 3 |" in fit and "| lowrank 33 % | 3 |" in fit


def test_what_a_run_cost_is_summed_over_restarts() -> None:
    first = Spent(4, 100.0, 60.0, {}, 0)
    first.step(0.0)
    first.step(0.5)
    assert first.read()["training_flops"] == 230.0
    state = json.loads(json.dumps(first.state()))
    second = Spent(8, 100.0, 60.0, state, 2)
    before = second.read()
    second.step(1.0)
    after = second.read()
    assert after["training_flops"] == 390.0
    seconds = after["wall_time_seconds"] - before["wall_time_seconds"]  # type: ignore[operator]
    hours = after["device_hours"] - before["device_hours"]  # type: ignore[operator]
    assert seconds > 0 and hours == pytest.approx(8 * seconds / 3600)
    unknown = Spent(8, 100.0, 60.0, {}, 2)  # of a run of before
    unknown.step(0.0)
    assert set(unknown.read().values()) == {None}


def test_tensorboard_begins_with_the_loss(tmp_path: Path) -> None:
    """Sections and curves are sorted by name there; runs are named by their folder."""
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    writer = MetricWriter(run, 0, {})
    distances = {f"guide_distance/blocks.{block}.fc1": 0.1 * block for block in range(1, 24)}
    values = dict.fromkeys(TENSORBOARD_TAGS, 1.0)
    writer.write(1, {**values, **distances, "validation_loss/books": 2.0})
    writer.close()
    board = EventAccumulator(str(run)).Reload()
    tags = sorted(board.Tags()["scalars"])
    assert tags[0] == "1_loss/train" and "1_loss/validation_of_books" in tags
    sections = list(dict.fromkeys(tag.split("/")[0] for tag in tags))
    assert sections == ["1_loss", "2_optimizer", "3_speed", "4_spent", "5_data", "6_guided"]
    shown = {tag: board.Scalars(tag)[0].value for tag in tags if tag.startswith("6_guided/distance")}
    assert shown == {"6_guided/distance_max": pytest.approx(2.3), "6_guided/distance_mean": pytest.approx(1.2)}
    record = json.loads((run / "metrics.jsonl").read_text())
    assert all(record[key] == value for key, value in distances.items())


def test_the_curves_of_an_earlier_run_begin_anew(tmp_path: Path) -> None:
    """Its events were written into a subfolder, under other tags."""
    former = tmp_path / "tensorboard" / "events.out.tfevents.1.old"
    former.parent.mkdir()
    former.write_bytes(b"earlier events")
    lines = [json.dumps({"step": step, "loss": 9.0 - step, "mfu": None}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "lo')
    for first, loss in ((3, 0.5), (4, 0.25)):  # resumed after step 2, then after step 3
        writer = MetricWriter(tmp_path, first - 1, {})
        writer.write(first, {"loss": loss})
        writer.close()
    shown = EventAccumulator(str(tmp_path)).Reload().Scalars("1_loss/train")
    assert [(event.step, event.value) for event in shown] == [(1, 8.0), (2, 7.0), (3, 0.5), (4, 0.25)]
    assert former.read_bytes() == b"earlier events"


def test_what_cannot_be_drawn_or_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture without a suffix would get another name; a loss of a run that diverged has a perplexity, too."""
    run = write_run(tmp_path, "diverged", DENSE, [4.0, 800.0])
    plot_runs.main([str(run), "--table"])
    assert "800.0000" in capsys.readouterr().out
    for output in ("curves", ""):
        with pytest.raises(SystemExit) as stopped:
            plot_runs.main([str(run), "--output", str(tmp_path / output)])
        assert stopped.value.code == 2 and "has no suffix" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(SystemExit) as stopped:
        plot_runs.main([str(run), "--table"])
    assert stopped.value.code == 2 and "not a JSON object" in capsys.readouterr().err
