#!/usr/bin/env python
"""Train a SentencePiece tokenizer like LLaMA's (BPE with byte fallback) on text shards.

    python tools/train_tokenizer.py --input DIR_OR_GLOB --output tokenizers/en32k/ --vocab-size 32000

The same shards and options give the same file. Beside NAME.model lies NAME.training.json, which says how it was made.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout that is not installed

from megastruct.data.sources.patience import read_patiently
from megastruct.data.sources.shards import TextShard, check_shards, find_shards
from megastruct.errors import Problem, UserError, user_errors_exit
from megastruct.files import write_atomically

# As LLaMA's tokenizer; what is not said here is SentencePiece's default.
TRAINING_OPTIONS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.99995,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "hard_vocab_limit": True,
}
MAX_SENTENCE_CHARACTERS = 4000
MAX_SENTENCE_BYTES = 4 * MAX_SENTENCE_CHARACTERS + 1  # SentencePiece silently drops what is longer


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="folder, glob, file or Hugging Face name of text shards")
    parser.add_argument(
        "--output", required=True, help="FOLDER/ (for FOLDER/tokenizer.model) or PREFIX (for PREFIX.model)"
    )
    parser.add_argument("--vocab-size", required=True, type=int, help="number of ids, with bytes and control tokens")
    parser.add_argument("--text-column", default="content", help="column that holds the text (default: %(default)s)")
    parser.add_argument(
        "--max-characters", type=int, default=50_000_000, help="read so much text at most (default: %(default)s)"
    )
    return parser.parse_args(argv)


def sentences(shards: list[TextShard], text_column: str, max_characters: int) -> Iterator[str]:
    """Lines of the documents, the same number of characters from each shard, about `max_characters` in all."""
    for index, shard in enumerate(shards):
        left = max_characters * (index + 1) // len(shards) - max_characters * index // len(shards)
        for documents in read_patiently(shard, text_column):
            if left <= 0:
                break
            for line in (line for document in documents for line in document.text.split("\n")):
                line = line[: max(0, left)].replace("\0", "")
                left -= len(line) + 1
                for start in range(0, len(line), MAX_SENTENCE_CHARACTERS):
                    yield line[start : start + MAX_SENTENCE_CHARACTERS]


def train(shards: list[TextShard], text_column: str, vocab_size: int, max_characters: int) -> bytes:
    """The model file's content.

    Raises:
        UserError: the vocabulary is too large or too small for the text, or there is no text.
    """
    lines = sentences(shards, text_column, max_characters)
    first = next(lines, None)
    if first is None:
        raise UserError(Problem("--input", "the shards hold no text", "give shards with documents, or more characters"))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chained(first, lines),
            model_writer=model,
            vocab_size=vocab_size,
            max_sentence_length=MAX_SENTENCE_BYTES,
            minloglevel=2,
            **TRAINING_OPTIONS,
        )
    except RuntimeError as error:
        raise _vocab_size_error(vocab_size, str(error)) from error
    return model.getvalue()


def _chained(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _vocab_size_error(vocab_size: int, message: str) -> Exception:
    """The user's message for SentencePiece's complaint about the vocabulary; other complaints are bugs of ours."""
    if most := re.search(r"Vocabulary size too high.*<= (\d+)", message):
        found = f"{vocab_size} is more than this text gives"
        return UserError(Problem("--vocab-size", found, f"--vocab-size {most[1]} or less, or more text"))
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        found = f"{vocab_size} is too small for bytes, control tokens and the characters of this text"
        return UserError(Problem("--vocab-size", found, f"--vocab-size {least[1]} or more"))
    return RuntimeError(f"SentencePiece failed: {message}")


def output_paths(output: str) -> tuple[Path, Path]:
    """(model file, record of how it was made) for a folder or a prefix."""
    path = Path(output.removesuffix(".model"))
    if path.is_dir() or output.endswith("/"):
        path = path / "tokenizer"
    return path.with_name(path.name + ".model"), path.with_name(path.name + ".training.json")


def is_done(model_path: Path, record_path: Path, settings: dict) -> bool:
    """Whether the model is there, made in the same way.

    Raises:
        UserError: another model is there.
    """
    if not model_path.exists():
        return False
    suggestion = "give another --output, or remove the file"
    try:
        record = json.loads(record_path.read_text())
        old_settings, fingerprint = record["settings"], record["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(Problem("--output", f"{model_path} exists and was not made by this tool", suggestion)) from None
    if hashlib.sha256(model_path.read_bytes()).hexdigest() != fingerprint:
        raise UserError(Problem("--output", f"{model_path} was changed since it was made", suggestion))
    differing = sorted(
        key for key in settings.keys() | old_settings.keys() if settings.get(key) != old_settings.get(key)
    )
    if differing:
        found = f"{model_path} was made with other settings ({', '.join(differing)})"
        raise UserError(Problem("--output", found, suggestion))
    return True


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    with user_errors_exit():
        for option in ("vocab_size", "max_characters"):
            if getattr(arguments, option) < 1:
                name = "--" + option.replace("_", "-")
                raise UserError(Problem(name, f"{getattr(arguments, option)} is less than 1", f"{name} 32000"))
        shards = find_shards(arguments.input, "--input")
        settings = {
            "vocab_size": arguments.vocab_size,
            "max_characters": arguments.max_characters,
            "text_column": arguments.text_column,
            "training_options": TRAINING_OPTIONS,
            "sources": [[shard.name, shard.num_bytes] for shard in shards],
        }
        model_path, record_path = output_paths(arguments.output)
        if is_done(model_path, record_path, settings):
            print(f"already done: {model_path}")
            return
        check_shards(shards, arguments.text_column)
        model = train(shards, arguments.text_column, arguments.vocab_size, arguments.max_characters)
        record = {"fingerprint": hashlib.sha256(model).hexdigest(), "settings": settings}
        model_path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record_path, json.dumps(record, indent=1).encode() + b"\n")
        write_atomically(model_path, model)  # last: the model is there only if its record is
        print(f"done: {model_path} with {arguments.vocab_size} ids (sha256 {record['fingerprint'][:12]}...)")


if __name__ == "__main__":
    main()
