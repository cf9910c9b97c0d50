"""A power law of the final loss over several sizes of a model, for each structure.

The losses of models that were trained for a multiple of their size lie close to a line over the training FLOPs if both
axes are logarithmic; a steeper line gains more from compute. Source: arXiv 2406.16450, section 4.2; Kaplan et al. 2020
(arXiv 2001.08361).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megastruct.errors import Problem, UserError
from megastruct.metrics.records import Run

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
    """A fit for every group of runs over the last values of `x` and `y`. Raises UserError for fewer than 3 sizes."""
    groups: dict[str, list[tuple[float, float]]] = {run.group: [] for run in runs}
    for run in runs:
        last_x, last_y = run.last(x), run.last(y)
        if last_x is not None and last_y is not None and min(last_x, last_y) > 0:
            groups[run.group].append((last_x, last_y))
    sizes = {group: len({point[0] for point in points}) for group, points in groups.items()}
    problems = [
        Problem(
            "--fit",
            f"{group} has {found} sizes with {x} and {y}, which is too few to tell a slope and its error",
            f"at least {MIN_SIZES} sizes of each structure, or GROUP=RUN to say what belongs together",
        )
        for group, found in sizes.items()
        if found < MIN_SIZES
    ]
    if problems:
        raise UserError(problems)
    return [_fit(group, sorted(points)) for group, points in groups.items()]


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
    lines += [f"| {fit.group} | {len(fit.points)} | {fit.slope:.4f} | {fit.slope_error:.4f} |" for fit in fits]
    return "\n".join(lines)
