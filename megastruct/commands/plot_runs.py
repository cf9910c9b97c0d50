"""Plot curves of several runs as a PNG: megastruct-plot runs/dense runs/lowrank --output curves.png."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megastruct.errors import user_errors_exit
from megastruct.metrics.curves import plot


def main(argv: Sequence[str] | None = None) -> None:
    """Write the picture and print its path. A user's mistake exits with code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders; NAME_1, NAME_2 ... share a color")
    parser.add_argument(
        "--metric",
        action="append",
        help="key of metrics.jsonl, may be repeated; one panel each (default: validation_loss)",
    )
    parser.add_argument(
        "--x", default="tokens", help="key of the horizontal axis, for example step (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="default: %(default)s")
    args = parser.parse_args(argv)
    with user_errors_exit():
        plot(args.runs, args.metric or ["validation_loss"], args.x, args.output)
    print(args.output)
