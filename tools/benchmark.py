#!/usr/bin/env python
"""Measure parts of the project beside what others would use.

    python tools/benchmark.py data --input DIR_OR_GLOB --tokenizer tokenizer.model

data: text to tokens and tokens to batches.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout that is not installed

from megastruct.benchmarks.data import Row, measure
from megastruct.errors import Problem, UserError, user_errors_exit


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    data = what.add_parser("data", help="text to tokens and tokens to batches")
    data.add_argument("--input", required=True, help="folder, glob, file or Hugging Face name of text shards")
    data.add_argument("--tokenizer", required=True, help="SentencePiece model file (BPE)")
    data.add_argument("--text-column", default="content", help="column that holds the text (default: %(default)s)")
    data.add_argument("--max-characters", type=int, default=10_000_000, help="text to measure on (%(default)s)")
    data.add_argument("--rounds", type=int, default=3, help="the best of so many counts (%(default)s)")
    arguments = parser.parse_args(argv)
    with user_errors_exit():
        benchmark_data(arguments)


def benchmark_data(arguments: argparse.Namespace) -> None:
    for option in ("max_characters", "rounds"):
        if getattr(arguments, option) < 1:
            name = "--" + option.replace("_", "-")
            raise UserError(Problem(name, f"{getattr(arguments, option)} is less than 1", f"leave {name} out"))
    measured = measure(
        arguments.input, arguments.tokenizer, arguments.text_column, arguments.max_characters, arguments.rounds
    )
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{measured.num_documents:,} documents, {measured.num_characters:,} characters")
    print_table("text to tokens, per CPU second", measured.preparing)
    print_table("batches, per second of one training process", measured.reading)


def print_table(title: str, rows: list[Row]) -> None:
    """Speeds, and each as a multiple of the first row's."""
    print(f"\n{title}")
    for row in rows:
        speed = row.note or f"{row.tokens_per_second / 1e6:8.2f} M tokens/s"
        ratio = "" if row.note else f"  {row.tokens_per_second / rows[0].tokens_per_second:6.1%}  {row.num_tokens:,}"
        print(f"  {row.name:<44}{speed}{ratio}")


if __name__ == "__main__":
    main()
