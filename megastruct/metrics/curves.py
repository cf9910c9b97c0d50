"""Plot the curves of several runs from the metrics in their folders."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megastruct.errors import Problem, UserError

WIDTH, HEIGHT = 8.0, 5.0  # inches, of one panel


def plot(runs: Sequence[Path], metrics: Sequence[str], x: str, output: Path) -> None:
    """Write the picture `output`: one panel for each of `metrics` over `x`, with one line per run folder.

    Raises:
        UserError: a folder has no metrics, no run has a metric, matplotlib is missing, or `output` cannot be written.
    """
    records = _read_all(runs)
    keys = {key for run in records for record in run for key, value in record.items() if _is_number(value)}
    known = ", ".join(sorted(keys))
    unknown = [
        Problem("--x" if key == x else "--metric", f"no run has {key}", f"give one of {known}")
        for key in dict.fromkeys((*metrics, x))
        if key not in keys
    ]
    if unknown:
        raise UserError(unknown)
    try:
        import matplotlib  # takes seconds to import
    except ModuleNotFoundError:
        raise UserError(Problem("matplotlib", "not installed", "pip install 'megastruct[plot]'")) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = _labels([run.name for run in runs])
    colors = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(names))}
    figure, axes = pyplot.subplots(len(metrics), 1, squeeze=False, figsize=(WIDTH, HEIGHT * len(metrics)))
    for axis, metric in zip(axes[:, 0], metrics, strict=True):
        drawn: set[str] = set()
        for name, of_run in zip(names, records, strict=True):
            points = [(r[x], r[metric]) for r in of_run if _is_number(r.get(x)) and _is_number(r.get(metric))]
            if points:
                label = f"_{name}" if name in drawn else name  # matplotlib leaves names with _ out of the legend
                axis.plot(*zip(*points, strict=True), label=label, color=colors[name], linewidth=1.2)
                drawn.add(name)
        axis.set_xlabel(x)
        axis.set_ylabel(metric)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    try:
        figure.savefig(output, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(Problem("--output", f"{output}: {error}", "--output curves.png")) from None
    pyplot.close(figure)


def _labels(names: list[str]) -> list[str]:
    """Legend labels: runs whose names differ only in a final _DIGIT, such as a seed, share a label and a color."""
    stems = [re.sub(r"_\d$", "", name) for name in names]
    return [stem if stems.count(stem) > 1 else name for name, stem in zip(names, stems, strict=True)]


def _read_all(runs: Sequence[Path]) -> list[list[dict[str, Any]]]:
    problems, records = [], []
    for run in runs:
        try:
            lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            records.append(
                [json.loads(line) for line in lines if line.endswith("\n")]
            )  # the last line may be incomplete
        except (OSError, ValueError) as error:
            found = f"metrics.jsonl cannot be read ({getattr(error, 'strerror', None) or error})"
            problems.append(Problem(str(run), found, "give a run folder, for example runs/quickstart"))
    if problems:
        raise UserError(problems)
    return records


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
