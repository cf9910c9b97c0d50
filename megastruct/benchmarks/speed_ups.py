"""The picture of the benchmark `kernels`: speed-up by width, and the bound that FLOPs set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megastruct.benchmarks.kernels import Compared
from megastruct.metrics.curves import figure


def plot_speed_ups(rows: Sequence[Compared], output: Path, option: str) -> None:
    """Write the picture: a panel for each number of tokens, compiled or not, and a line for each structure and share.

    The bound of a line is dashed and has its color. Layers without times are left out.

    Raises:
        UserError: the picture cannot be made or written; it names `option`.
    """
    panels = list(dict.fromkeys(_panel(row) for row in rows))
    lines = list(dict.fromkeys(_line(row) for row in rows if not row.measured.layer.is_dense))
    with figure(len(panels), output, option) as axes:
        for axis, panel in zip(axes, panels, strict=True):
            axis.axhline(1.0, color="black", linewidth=0.8, label="dense")
            for index, line in enumerate(lines):
                here = [row for row in rows if _panel(row) == panel and _line(row) == line]
                timed = [(row.measured.layer.hidden_size, row.speed_up) for row in here if row.speed_up is not None]
                bounds = [(row.measured.layer.hidden_size, row.bound) for row in here]
                if timed:
                    color = f"C{index}"
                    axis.plot(*zip(*timed, strict=True), "o-", color=color, linewidth=1.2, label=line)
                    axis.plot(*zip(*bounds, strict=True), "_--", color=color, linewidth=0.8, label=f"_bound of {line}")
            tokens, compiled = panel
            axis.set_title(f"{tokens:,} tokens, {'compiled' if compiled else 'not compiled'}; dashed: bound by FLOPs")
            axis.set_xlabel("hidden size d")
            axis.set_ylabel("speed-up, forward and backward")


def _panel(row: Compared) -> tuple[int, bool]:
    return row.measured.setting.tokens, row.measured.setting.compiled


def _line(row: Compared) -> str:
    layer = row.measured.layer
    return layer.name if layer.wanted_share is None else f"{layer.structure}, {layer.wanted_share:.0%}"
