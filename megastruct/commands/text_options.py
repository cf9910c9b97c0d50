"""The options by which the tools are given text."""

from __future__ import annotations

import argparse

from megastruct.data.sources.check import TEXT_COLUMNS
from megastruct.data.sources.choice import ALL_SPLITS, Choice
from megastruct.paths import option_text


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Add --input, --text-column, --config, --split and --include."""
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        action="extend",
        type=option_text,
        help="folders, globs, files, Hugging Face names or addresses (s3://...) of text shards",
    )
    add_column_option(parser)
    parser.add_argument("--config", help="configuration of the dataset, such as en")
    parser.add_argument("--split", help=f"split of the dataset, such as train; {ALL_SPLITS}: every file")
    parser.add_argument(
        "--include",
        nargs="+",
        action="extend",
        default=[],
        metavar="GLOB",
        help="read only files whose names below the input match one of these patterns (default: all)",
    )


def add_column_option(parser: argparse.ArgumentParser) -> None:
    """Add --text-column."""
    parser.add_argument(
        "--text-column", help=f"column that holds the text (default: {', or else '.join(TEXT_COLUMNS)})"
    )


def choice_of(arguments: argparse.Namespace) -> Choice:
    """What was chosen by the options of `add_input_options`, except the column."""
    return Choice(arguments.config, arguments.split, tuple(arguments.include))


def columns_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The columns that may hold the text, the first that is there: that of --text-column alone, if it is given."""
    return TEXT_COLUMNS if arguments.text_column is None else (arguments.text_column,)
