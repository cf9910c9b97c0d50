"""Write a few MB of real English text as shards in RefinedWeb's schema, without a download.

    megastruct-sample-corpus --output corpus/

The text ships with Python: the language reference of `help()` and the docstrings of the standard library. The same
Python version gives the same shards. The corpus is for trying things out; it is far too small to train a useful model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megastruct.console import command
from megastruct.data.preparation.sample_corpus import write_sample_corpus
from megastruct.errors import Problem, UserError, user_errors_exit
from megastruct.paths import option_path


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Write the corpus and print its size. A user's mistake exits with code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=option_path, help="folder for the shards")
    parser.add_argument("--num-shards", type=int, default=4, help="number of files (default: %(default)s)")
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    with user_errors_exit():
        if arguments.num_shards < 1:
            raise UserError(Problem("--num-shards", f"{arguments.num_shards} is less than 1", "--num-shards 4"))
        corpus = write_sample_corpus(arguments.output, arguments.num_shards, arguments.format)
    if corpus is None:
        print(f"already done: {arguments.output}")
    else:
        print(
            f"done: {arguments.output}: {corpus.num_documents:,} documents, {corpus.num_characters:,} characters, "
            f"{arguments.num_shards} {arguments.format} shards"
        )
