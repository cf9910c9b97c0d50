"""The one way in: everything that can be wrong with the data is found here, before a model is built."""

from __future__ import annotations

from pathlib import Path

from megastruct.data.manifest import TOKENIZER_NAME, Manifest, check_files, load_manifest
from megastruct.data.order import default_num_streams
from megastruct.data.source import MANIFEST_NAME, TextShard, check_shards, find_shards
from megastruct.data.text_data import TextData
from megastruct.data.text_stream import TextSource
from megastruct.data.token_data import TokenData
from megastruct.data.tokenizer import Tokenizer
from megastruct.errors import Problem, UserError


def open_data(
    kind: str,
    path: str,
    tokenizer: str | None,
    *,
    seq_length: int,
    vocab_size: int,
    seed: int,
    text_column: str = "content",
    validation_fraction: float = 0.005,
    num_streams: int | None = None,
    base_folder: Path | None = None,
) -> TokenData | TextData:
    """Open token shards (kind "tokens") or text shards (kind "text") for training.

    Args:
        path: the folder of token shards; or a folder, glob, file or Hugging Face name of text shards. Relative paths
            start at `base_folder`, the current directory if that is None.
        tokenizer: a SentencePiece model; token shards carry a copy, and a given one must equal it.
        seq_length: tokens per sample without the last label.
        vocab_size: the model's; at least the tokenizer's.
        seed: of the data order.
        text_column, validation_fraction, num_streams: for text only; token shards have them fixed.

    Raises:
        UserError: anything is missing, damaged or does not fit, with all problems that one look can find.
        ValueError: `kind` or a number is outside of what the config's checks allow.
    """
    if kind not in ("tokens", "text"):
        raise ValueError(f"kind must be 'tokens' or 'text', got {kind!r}")
    if seq_length < 1 or not 0 <= validation_fraction < 1 or (num_streams is not None and num_streams < 1):
        raise ValueError("wanted: seq_length >= 1, 0 <= validation_fraction < 1, num_streams >= 1 or None")
    base_folder = (base_folder or Path()).absolute()
    model = base_folder / Path(tokenizer).expanduser() if tokenizer else None
    if kind == "tokens":
        folder = base_folder / Path(path).expanduser()
        return _open_tokens(folder, model, seq_length, vocab_size, seed)

    problems: list[Problem] = []
    opened = _collect(problems, lambda: _open_text_tokenizer(model, vocab_size))
    shards = _collect(problems, lambda: _open_shards(path, text_column, num_streams, base_folder))
    if problems:
        raise UserError(problems)
    streams = num_streams or default_num_streams(len(shards))
    return TextData(TextSource(shards, opened, text_column, validation_fraction, seed, streams), seq_length)


def _collect(problems: list[Problem], build):
    """What `build` returns, or None with its problems added to `problems`."""
    try:
        return build()
    except UserError as error:
        problems += [Problem("", error.headline)] if error.headline else []
        problems += error.problems
        return None


def _open_text_tokenizer(model: Path | None, vocab_size: int) -> Tokenizer:
    if model is None:
        suggestion = "give a SentencePiece model, for example one made with tools/train_tokenizer.py"
        raise UserError(Problem("data.tokenizer", "is not set, and text shards need it", suggestion))
    tokenizer = Tokenizer(model, where="data.tokenizer")
    _check_vocab_size(tokenizer.vocab_size, vocab_size)
    return tokenizer


def _open_shards(path: str, text_column: str, num_streams: int | None, base_folder: Path) -> list[TextShard]:
    shards = find_shards(path, "data.path", base_folder)
    check_shards(shards, text_column)
    if num_streams is not None and num_streams > len(shards):
        found = f"{num_streams} streams are more than the {len(shards)} text shards"
        raise UserError(Problem("data.num_streams", found, f"set it to {len(shards)} or less, or leave it out"))
    return shards


def _open_tokens(folder: Path, model: Path | None, seq_length: int, vocab_size: int, seed: int) -> TokenData:
    if not (folder / MANIFEST_NAME).is_file():
        what = f"has no {MANIFEST_NAME}" if folder.is_dir() else "is no folder"
        suggestion = "make token shards with tools/prepare_data.py, or read text directly with data.kind=text"
        raise UserError(Problem("data.path", f"{folder} {what}", suggestion))
    manifest = load_manifest(folder)
    problems: list[Problem] = []
    _collect(problems, lambda: check_files(folder, manifest))
    tokenizer = _collect(problems, lambda: _open_matching_tokenizer(folder, manifest, model))
    _collect(problems, lambda: _check_vocab_size(manifest.settings.tokenizer.vocab_size, vocab_size))
    if problems:
        raise UserError(problems)
    return TokenData(folder, manifest, tokenizer, seq_length, vocab_size, seed)


def _open_matching_tokenizer(folder: Path, manifest: Manifest, model: Path | None) -> Tokenizer:
    wanted = manifest.settings.tokenizer
    if model is not None:
        tokenizer = Tokenizer(model, where="data.tokenizer")
        where, suggestion = "data.tokenizer", f"leave it out: the folder carries its own {TOKENIZER_NAME}"
    else:
        tokenizer = Tokenizer(folder / wanted.file)
        where, suggestion = str(tokenizer.path), "make the folder again with tools/prepare_data.py, or copy it again"
    if tokenizer.fingerprint != wanted.fingerprint:
        found = (
            f"{tokenizer.path} is not the tokenizer that {folder} was made with "
            f"(sha256 {tokenizer.fingerprint[:12]}... instead of {wanted.fingerprint[:12]}...)"
        )
        raise UserError(Problem(where, found, suggestion))
    return tokenizer


def _check_vocab_size(of_tokenizer: int, of_model: int) -> None:
    if of_model < of_tokenizer:
        found = f"{of_model} is less than the tokenizer's {of_tokenizer}"
        raise UserError(Problem("model.vocab_size", found, f"model.vocab_size={of_tokenizer} or more"))
