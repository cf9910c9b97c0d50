"""Compare runs: curves as a PNG, a scaling fit, or a table.

megastruct-plot runs/dense runs/lowrank --x training_flops --output curves.png
megastruct-plot runs/s runs/m runs/l runs/s_lowrank runs/m_lowrank runs/l_lowrank --fit
megastruct-plot runs/dense runs/lowrank --table
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megastruct.console import command
from megastruct.errors import Problem, UserError, user_errors_exit
from megastruct.metrics.curves import check_keys, plot, plot_fits
from megastruct.metrics.records import AXES, FLOPS, PARAMETERS, TOKENS, VALIDATION, Run, read_runs
from megastruct.metrics.run_table import run_table
from megastruct.metrics.scaling import fit_scaling, fit_table
from megastruct.paths import option_path


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Write what is asked for, and print where it is. A user's mistake exits with code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs",
        nargs="+",
        help="run folders; NAME_1, NAME_2 ... share a color. GROUP=FOLDER says which runs --fit fits together "
        "(otherwise those of one structure with similar shares of the dense weights)",
    )
    parser.add_argument(
        "--metric",
        action="append",
        help=f"key of metrics.jsonl, may be repeated; one panel each (default: {VALIDATION})",
    )
    parser.add_argument(
        "--x",
        help=f"the horizontal axis: {TOKENS}, {', '.join(AXES)}, {FLOPS} or another key of metrics.jsonl, and with "
        f"--fit {PARAMETERS} too (default: {TOKENS}; {FLOPS} with --fit)",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--fit", action="store_true", help="fit a power law to the final losses of each structure")
    kind.add_argument("--table", action="store_true", help="print a Markdown table of the runs instead of a picture")
    parser.add_argument("--output", type=option_path, default=Path("curves.png"), help="default: %(default)s")
    args = parser.parse_args(argv)
    with user_errors_exit():
        runs = read_runs(args.runs)
        metrics = args.metric or [VALIDATION]
        if args.table:
            if args.metric or args.x:
                raise UserError(Problem("--table", "has fixed columns", "leave out --metric and --x"))
            print(run_table(runs))
        elif args.fit:
            _fit(runs, metrics, args.x or FLOPS, args.output)
        else:
            plot(runs, metrics, args.x or TOKENS, args.output)
            print(args.output)


def _fit(runs: list[Run], metrics: Sequence[str], x: str, output: Path) -> None:
    if len(metrics) > 1:
        raise UserError(Problem("--metric", "--fit fits one metric", f"--metric {metrics[0]}"))
    x = AXES.get(x, x)
    check_keys(runs, {"--x": [x], "--metric": metrics})
    fits = fit_scaling(runs, x, metrics[0])
    plot_fits(fits, x, metrics[0], output)
    print(f"{fit_table(fits, x)}\n\n{output}")
