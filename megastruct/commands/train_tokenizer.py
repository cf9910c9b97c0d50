"""Train a SentencePiece tokenizer like LLaMA's (BPE with byte fallback) on text shards.

    megastruct-tokenizer --input DIR_OR_GLOB --output tokenizers/en32k/ --vocab-size 32000

The same shards and options give the same file. NAME.training.json, next to NAME.model, records how it was made.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megastruct.commands.text_options import add_input_options, choice_of, columns_of
from megastruct.console import command
from megastruct.data.preparation.tokenizer import train_tokenizer
from megastruct.data.sources.place import Place
from megastruct.errors import Problem, UserError, user_errors_exit
from megastruct.paths import option_text


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Train the tokenizer and print its path. A user's mistake exits with code 2."""
    arguments = _parse(argv)
    with user_errors_exit():
        for option in ("vocab_size", "max_characters"):
            if getattr(arguments, option) < 1:
                name = "--" + option.replace("_", "-")
                raise UserError(Problem(name, f"{getattr(arguments, option)} is less than 1", f"{name} 32000"))
        trained = train_tokenizer(
            [Place(path, "--input", choice_of(arguments), columns_of(arguments)) for path in arguments.input],
            arguments.output,
            vocab_size=arguments.vocab_size,
            max_characters=arguments.max_characters,
            report=print,
        )
    if trained.is_new:
        print(f"done: {trained.path} with {arguments.vocab_size} ids (sha256 {trained.fingerprint[:12]}...)")
    else:
        print(f"already done: {trained.path}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_options(parser)
    parser.add_argument(
        "--output",
        required=True,
        type=option_text,
        help="FOLDER/ (for FOLDER/tokenizer.model) or PREFIX (for PREFIX.model)",
    )
    parser.add_argument(
        "--vocab-size", required=True, type=int, help="number of ids, including bytes and control tokens"
    )
    parser.add_argument(
        "--max-characters",
        type=int,
        default=50_000_000,
        help="largest number of characters to train on (default: %(default)s)",
    )
    return parser.parse_args(argv)
