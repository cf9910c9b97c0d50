"""Train a SentencePiece tokenizer like LLaMA's (BPE with byte fallback) on text shards.

The same shards and options give the same file. NAME.training.json, next to NAME.model, records how it was made.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

from megastruct.data.sources.check import check_shards
from megastruct.data.sources.place import Place, find_corpus
from megastruct.data.sources.reading import read_patiently
from megastruct.data.sources.shards import TextShard
from megastruct.errors import Problem, UserError
from megastruct.files import write_atomically

# The options of LLaMA's tokenizer; all others have SentencePiece's defaults.
TRAINING_OPTIONS: dict[str, Any] = {
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
MAX_SENTENCE_BYTES = 4 * MAX_SENTENCE_CHARACTERS + 1  # SentencePiece silently drops longer sentences


class Trained(NamedTuple):
    """A tokenizer's model file and its sha256; `is_new` is false if the file existed already with the same settings."""

    path: Path
    fingerprint: str
    is_new: bool


def train_tokenizer(
    places: Sequence[Place],
    output: str,
    vocab_size: int,
    max_characters: int,
    report: Callable[[str], None] = lambda _: None,
) -> Trained:
    """Train on about `max_characters` characters of the text of `places`, unless that has been done before.

    Args:
        output: FOLDER/ (for FOLDER/tokenizer.model) or PREFIX (for PREFIX.model).
        vocab_size: number of ids, including bytes and control tokens.
        report: receives lines about what is read.

    Raises:
        UserError: the shards cannot be read, their text does not suit `vocab_size`, or another file is at `output`.
    """
    corpus = find_corpus(places, validation_split=None)
    shards = corpus.shards
    for line in corpus.lines():
        report(line)
    columns = sorted({shard.text_column for shard in shards})
    settings = {
        "vocab_size": vocab_size,
        "max_characters": max_characters,
        "text_column": columns[0] if len(columns) == 1 else columns,
        "training_options": TRAINING_OPTIONS,
        "sources": [[shard.name, shard.num_bytes] for shard in shards],
    }
    model_path, record_path = _output_paths(output)
    if (fingerprint := _fingerprint_if_done(model_path, record_path, settings)) is not None:
        return Trained(model_path, fingerprint, is_new=False)
    check_shards(shards)
    model = _train(shards, vocab_size, max_characters)
    fingerprint = hashlib.sha256(model).hexdigest()
    record = {"fingerprint": fingerprint, "settings": settings}
    model_path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(record_path, json.dumps(record, indent=1).encode() + b"\n")
    write_atomically(model_path, model)  # last, so that a model never exists without its record
    return Trained(model_path, fingerprint, is_new=True)


def _sentences(shards: list[TextShard], max_characters: int) -> Iterator[str]:
    """Lines of documents, with the same number of characters from each shard and about `max_characters` in all."""
    for index, shard in enumerate(shards):
        left = max_characters * (index + 1) // len(shards) - max_characters * index // len(shards)
        for documents in read_patiently(shard, shard.text_column):
            if left <= 0:
                break
            for line in (line for document in documents for line in document.text.split("\n")):
                line = line[: max(0, left)].replace("\0", "")
                left -= len(line) + 1
                for start in range(0, len(line), MAX_SENTENCE_CHARACTERS):
                    yield line[start : start + MAX_SENTENCE_CHARACTERS]


def _train(shards: list[TextShard], vocab_size: int, max_characters: int) -> bytes:
    """The bytes of the model file.

    Raises:
        UserError: the vocabulary is too large or too small for the text, or there is no text.
    """
    lines = _sentences(shards, max_characters)
    first = next(lines, None)
    if first is None:
        raise UserError(
            Problem("--input", "the shards contain no text", "give shards with documents, or raise --max-characters")
        )
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
    """A UserError for SentencePiece's error about the vocabulary size; RuntimeError for any other error."""
    if most := re.search(r"Vocabulary size too high.*<= (\d+)", message):
        found = f"{vocab_size} is more than this text supports"
        return UserError(Problem("--vocab-size", found, f"--vocab-size {most[1]} or less, or give more text"))
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        found = f"{vocab_size} is too small for bytes, control tokens and the characters of this text"
        return UserError(Problem("--vocab-size", found, f"--vocab-size {least[1]} or more"))
    return RuntimeError(f"SentencePiece failed: {message}")


def _output_paths(output: str) -> tuple[Path, Path]:
    """(model file, file that records how it was made) for a folder or a prefix."""
    path = Path(output.removesuffix(".model"))
    if path.is_dir() or output.endswith("/"):
        path = path / "tokenizer"
    return path.with_name(path.name + ".model"), path.with_name(path.name + ".training.json")


def _fingerprint_if_done(model_path: Path, record_path: Path, settings: dict[str, Any]) -> str | None:
    """The sha256 of an existing model made with the same settings; None if there is no model.

    Raises:
        UserError: the existing model was made otherwise, or changed.
    """
    if not model_path.exists():
        return None
    suggestion = "give another --output, or remove the file"
    try:
        record = json.loads(record_path.read_text())
        old_settings, fingerprint = record["settings"], record["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(Problem("--output", f"{model_path} exists and was not made by this tool", suggestion)) from None
    if hashlib.sha256(model_path.read_bytes()).hexdigest() != fingerprint:
        raise UserError(Problem("--output", f"{model_path} has been changed since it was made", suggestion))
    differing = sorted(
        key for key in settings.keys() | old_settings.keys() if settings.get(key) != old_settings.get(key)
    )
    if differing:
        found = f"{model_path} was made with other settings ({', '.join(differing)})"
        raise UserError(Problem("--output", found, suggestion))
    return fingerprint
