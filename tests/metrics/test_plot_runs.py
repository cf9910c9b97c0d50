"""tools/plot_runs.py: the curves that are in the records are the curves in the picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megastruct.commands import plot_runs


def write_run(folder: Path, last: float) -> Path:
    folder.mkdir()
    records: list[dict[str, Any]] = [
        {"step": step, "tokens": 8 * step, "loss": 5.0, "mfu": None} for step in range(1, 5)
    ]
    records[1]["validation_loss"], records[3]["validation_loss"] = 4.0, last
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + '{"step": 5, "tok')  # killed while it was written
    return folder


def test_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from matplotlib import pyplot
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: (drawn.append((k["label"], *a)), plot(self, *a, **k))[1])
    runs = [write_run(tmp_path / "dense", 3.0), write_run(tmp_path / "lowrank", 3.5)]
    output = tmp_path / "curves.png"
    plot_runs.main([*map(str, runs), "--metric", "validation_loss", "--metric", "loss", "--output", str(output)])
    assert drawn[:2] == [("dense", (16, 32), (4.0, 3.0)), ("lowrank", (16, 32), (4.0, 3.5))]
    assert drawn[2] == ("dense", (8, 16, 24, 32), (5.0,) * 4)
    assert pyplot.imread(output).shape[:2] == (1500, 1200)
    assert capsys.readouterr().out.strip() == str(output)


def test_runs_that_differ_in_their_seed_are_drawn_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, *a, **k: (drawn.append((k["label"], k["color"])), plot(self, *a, **k))[1]
    )
    names = ("rows_1", "dense_1", "rows_2", "xl_32", "xl_63")
    runs = [str(write_run(tmp_path / name, 3.0)) for name in names]
    plot_runs.main([*runs, "--metric", "loss", "--output", str(tmp_path / "curves.png")])
    assert drawn == [("rows", "C0"), ("dense_1", "C1"), ("_rows", "C0"), ("xl_32", "C2"), ("xl_63", "C3")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--metric", "mfu"], "--metric: no run has mfu"),
        (["{run}", "--x", "epochs"], "--x: no run has epochs"),
        (["{run}", "nowhere"], "nowhere: metrics.jsonl cannot be read (No such file or directory)"),
        (["{run}", "--output", "nowhere/curves.png"], "--output: nowhere/curves.png: "),
        (["{run}", "--output", "{run}/curves.tokens"], "--output: "),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    run = write_run(tmp_path / "dense", 3.0)
    with pytest.raises(SystemExit) as stopped:
        plot_runs.main([argument.format(run=run) for argument in arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stopped:
        plot_runs.main([str(write_run(tmp_path / "dense", 3.0)), "--output", str(tmp_path / "curves.png")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: matplotlib: not installed\n    try: pip install 'megastruct[plot]'\n"
