"""Curves of runs side by side as a PNG: megastruct-plot runs/dense runs/lowrank --output curves.png."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megastruct.errors import user_errors_exit
from megastruct.metrics.curves import plot


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders; NAME_1, NAME_2 ... are drawn alike")
    parser.add_argument("--metric", action="append", help="keys of metrics.jsonl, a panel each [validation_loss]")
    parser.add_argument("--x", default="tokens", help="key of the horizontal axis [tokens]; step is one, too")
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    args = parser.parse_args(argv)
    with user_errors_exit():
        plot(args.runs, args.metric or ["validation_loss"], args.x, args.output)
    print(args.output)
