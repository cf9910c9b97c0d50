"""Plot the curves of several runs, and power laws over several sizes, as a PNG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megastruct.errors import Problem, UserError
from megastruct.metrics.records import AXES, Run, known_keys, labels
from megastruct.metrics.scaling import Fit

WIDTH, HEIGHT = 8.0, 5.0  # inches, of one panel


def plot(runs: Sequence[Run], metrics: Sequence[str], x: str, output: Path) -> None:
    """Write the picture `output`: one panel for each of `metrics` over `x`, with one line per run.

    Raises:
        UserError: no run has a metric, matplotlib is missing, or `output` cannot be written.
    """
    x = AXES.get(x, x)
    check_keys(runs, {"--x": [x], "--metric": metrics})
    names = labels([run.name for run in runs])
    colors = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(names))}
    with figure(len(metrics), output) as axes:
        for axis, metric in zip(axes, metrics, strict=True):
            drawn: set[str] = set()
            for name, run in zip(names, runs, strict=True):
                if points := run.points(x, metric):
                    label = f"_{name}" if name in drawn else name  # matplotlib leaves names with _ out of the legend
                    axis.plot(*zip(*points, strict=True), label=label, color=colors[name], linewidth=1.2)
                    drawn.add(name)
            axis.set_xlabel(x)
            axis.set_ylabel(metric)


def plot_fits(fits: Sequence[Fit], x: str, y: str, output: Path) -> None:
    """Write the picture `output`: final losses and their power laws, on logarithmic axes.

    Raises UserError as `plot` does.
    """
    with figure(1, output) as [axis]:
        for index, fit in enumerate(fits):
            xs = [point[0] for point in fit.points]
            axis.plot(xs, [point[1] for point in fit.points], "o", color=f"C{index}")
            label = f"{fit.group}: slope {fit.slope:.4f} ± {fit.slope_error:.4f}"
            axis.plot(xs, [fit.loss(value) for value in xs], color=f"C{index}", linewidth=1.2, label=label)
        axis.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")  # losses lie within one power of ten, where no major tick is


def check_keys(runs: Sequence[Run], keys: dict[str, Sequence[str]]) -> None:
    """Raises UserError for keys, by option, that no run has."""
    known = known_keys(runs)
    unknown = [
        Problem(option, f"no run has {key}", f"give one of {', '.join(sorted(known))}")
        for option, asked in keys.items()
        for key in dict.fromkeys(asked)
        if key not in known
    ]
    if unknown:
        raise UserError(unknown)


def check_output(output: Path, option: str = "--output") -> None:
    """Raises UserError if no picture can be made, or if the name does not say its format."""
    try:
        import matplotlib  # noqa: F401 - takes seconds to import
    except ModuleNotFoundError:
        raise UserError(Problem("matplotlib", "not installed", "pip install 'megastruct[plot]'")) from None
    from matplotlib.backend_bases import FigureCanvasBase

    if not output.suffix:  # matplotlib would add one, and write to another file than the one that is named
        raise UserError(Problem(option, f"{output} has no suffix, which says the format", f"{option} {output}.png"))
    if output.suffix[1:].lower() not in (formats := FigureCanvasBase.get_supported_filetypes()):
        found = f"{output}: {output.suffix} is none of the formats {', '.join(sorted(formats))}"
        raise UserError(Problem(option, found, f"{option} {output.with_suffix('.png')}"))


@contextmanager
def figure(num_panels: int, output: Path, option: str = "--output") -> Iterator[Sequence[Any]]:
    """The axes of the panels, one below the other, which are written to `output` in the end.

    Raises UserError, which names `option`, if the picture cannot be made or written.
    """
    check_output(output, option)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made, axes = pyplot.subplots(num_panels, 1, squeeze=False, figsize=(WIDTH, HEIGHT * num_panels))
    yield list(axes[:, 0])
    for axis in axes[:, 0]:
        axis.grid(alpha=0.3)
        axis.legend()
    made.tight_layout()
    try:
        made.savefig(output, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(Problem(option, f"{output}: {error}", f"{option} curves.png")) from None
    finally:
        pyplot.close(made)
