"""A power law of the final loss over several sizes of a model, for each structure.

The losses of models that were trained for a multiple of their size lie close to a line over the training FLOPs if both
axes are logarithmic; a steeper line gains more from compute. Source: arXiv 2406.16450, section 4.2; Kaplan et al. 2020
(arXiv 2001.08361).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megastruct.errors import Problem, Problems
from megastruct.metrics.records import Run, grouped
from megastruct.planning.steps import total_steps

MIN_SIZES = 3


@dataclass(frozen=True)
class Fit:
    """loss = exp(intercept) * x^slope for one group of runs.

    Attributes:
        group: the structure, or the name that was given.
        points: (x, final loss), by x.
        slope: exponent; negative if the loss falls.
        slope_error: its standard error, from the residuals.
        intercept: logarithm of the loss at x = 1.
    """

    group: str
    points: tuple[tuple[float, float], ...]
    slope: float
    slope_error: float
    intercept: float

    def loss(self, x: float) -> float:
        """The fitted loss."""
        return math.exp(self.intercept) * x**self.slope


def fit_scaling(runs: Sequence[Run], x: str, y: str) -> list[Fit]:
    """A fit for every group of runs, over the values of `x` and `y` in the last record that has `y`.

    Raises UserError for a run that is not finished or lacks one of the two, and for a group of fewer than 3 sizes.
    """
    problems = Problems(problem for run in runs for problem in _check(run, x, y))
    problems.raise_if_any()
    groups = {group: [run.points(x, y)[-1] for run in members] for group, members in grouped(runs).items()}
    for group, points in groups.items():
        found = len({point[0] for point in points})
        if found < MIN_SIZES:
            message = f"{group} has {found} of the {MIN_SIZES} sizes that a slope and its error need at least"
            problems.append(
                Problem("--fit", message, "more sizes of each structure, or GROUP=RUN to say what belongs together")
            )
    problems.raise_if_any()
    return [_fit(group, sorted(points)) for group, points in groups.items()]


def _check(run: Run, x: str, y: str) -> Iterator[Problem]:
    record, where = run.last_record(y), str(run.folder)
    missing = [key for key in (x, y) if (run.value(record, key) or 0.0) <= 0.0]
    if missing:
        yield Problem(where, f"no positive {' and '.join(missing)} in its last record", "leave this run out")
    elif run.config is not None and record["step"] < (total := total_steps(run.config)):
        yield Problem(where, f"its last {y} is that of step {record['step']} of {total}", "finish this run first")


def _fit(group: str, points: Sequence[tuple[float, float]]) -> Fit:
    log_x, log_y = np.log(np.array(points, dtype=np.float64)).T
    centred = log_x - log_x.mean()
    slope = float(centred @ (log_y - log_y.mean()) / (centred @ centred))
    intercept = float(log_y.mean() - slope * log_x.mean())
    residuals = log_y - (intercept + slope * log_x)
    error = math.sqrt(float(residuals @ residuals) / (len(points) - 2) / float(centred @ centred))
    return Fit(group, tuple(points), slope, error, intercept)


def fit_table(fits: Sequence[Fit], x: str) -> str:
    """The slopes as a Markdown table."""
    lines = [f"| structure | sizes | slope over {x} | standard error |", "|---|---|---|---|"]
    for fit in fits:
        sizes = len({at for at, _ in fit.points})  # runs of one size differ in their seeds
        lines.append(f"| {fit.group} | {sizes} | {fit.slope:.4f} | {fit.slope_error:.4f} |")
    return "\n".join(lines)
