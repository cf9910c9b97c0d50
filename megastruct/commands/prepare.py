"""Tokenise text shards once into token shards, so that training need not tokenise.

    megastruct-prepare --input DIR_OR_GLOB --output tokens/ --tokenizer tokenizer.model --workers 8

If it is interrupted, run it again to continue; a finished folder is left unchanged.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megastruct.commands.text_options import add_input_options, choice_of, columns_of
from megastruct.console import command
from megastruct.data.preparation.prepare import DEFAULT_VALIDATION_FRACTION, prepare
from megastruct.data.tokenizers.options import TokenizerOptions
from megastruct.errors import Problem, UserError, user_errors_exit
from megastruct.paths import option_path, option_text


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse `argv`, or `sys.argv` if it is None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_options(parser)
    parser.add_argument("--output", required=True, type=option_path, help="folder for the token shards")
    parser.add_argument(
        "--tokenizer",
        required=True,
        type=option_text,
        help="SentencePiece model, tokenizer.json, or a folder that has one",
    )
    parser.add_argument(
        "--eod-token", help="special token that ends a document (default: what the tokenizer's files say)"
    )
    parser.add_argument(
        "--bos-token",
        help="special token before every document; '' for none (default: what the tokenizer's files say, and none for "
        "SentencePiece)",
    )
    parser.add_argument(
        "--special-tokens-in-text",
        action="store_true",
        help="text that reads as a special token becomes that token; never the one that ends a document",
    )
    parser.add_argument(
        "--validation-split", help="split that is held out, such as validation; without it, a share of the documents"
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        help=f"share of the documents to hold out (default: {DEFAULT_VALIDATION_FRACTION})",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="worker processes, each tokenises one shard at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--max-shard-tokens", type=int, default=2**29, help="largest number of tokens per file (default: %(default)s)"
    )
    parser.add_argument(
        "--patience-seconds",
        type=float,
        default=300.0,
        help="how long to retry a shard that cannot be reached (default: %(default)s)",
    )
    return parser.parse_args(argv)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UserError for every number that is out of range."""
    problems = []
    if arguments.validation_split is not None and arguments.validation_fraction is not None:
        found = f"{arguments.validation_fraction} together with --validation-split {arguments.validation_split}"
        problems.append(Problem("--validation-fraction", found, "give one of the two"))
    elif arguments.validation_fraction is not None and not 0 <= arguments.validation_fraction < 1:
        found = f"{arguments.validation_fraction} is not in [0, 1)"
        problems.append(Problem("--validation-fraction", found, "--validation-fraction 0.005"))
    if str(arguments.output).partition("/")[0].endswith(":"):  # a Path has one slash less
        found = f"{arguments.output} is an address, but token shards are written to a folder of this machine"
        problems.append(Problem("--output", found, "--output FOLDER, then copy the folder to the address"))
    for option in ("workers", "max_shard_tokens"):
        if getattr(arguments, option) < 1:
            name = "--" + option.replace("_", "-")
            problems.append(Problem(name, f"{getattr(arguments, option)} is less than 1", f"leave {name} out"))
    if not arguments.patience_seconds >= 0:
        found = f"{arguments.patience_seconds} is negative or not a number"
        problems.append(Problem("--patience-seconds", found, "--patience-seconds 300"))
    if problems:
        raise UserError(problems)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Tokenise the shards. Exits with code 2 for a user's mistake, and with 130 for Ctrl-C."""
    arguments = parse_arguments(argv)
    fraction = arguments.validation_fraction
    with user_errors_exit():
        check_arguments(arguments)
        try:
            prepare(
                arguments.input,
                arguments.output,
                arguments.tokenizer,
                text_columns=columns_of(arguments),
                choice=choice_of(arguments),
                validation_split=arguments.validation_split,
                validation_fraction=DEFAULT_VALIDATION_FRACTION if fraction is None else fraction,
                num_workers=arguments.workers,
                max_shard_tokens=arguments.max_shard_tokens,
                patience_seconds=arguments.patience_seconds,
                tokenizer_options=TokenizerOptions(
                    arguments.eod_token, arguments.bos_token, arguments.special_tokens_in_text or None
                ),
                report=lambda line: print(line, flush=True),
            )
        except KeyboardInterrupt:
            print("interrupted; run the same command again to continue with the remaining shards", file=sys.stderr)
            raise SystemExit(130) from None
