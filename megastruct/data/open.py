"""The one way in: everything that can be wrong with the data is found here, before a model is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np

from megastruct.data.cache import cached_array, key_of
from megastruct.data.mixture import Mixture
from megastruct.data.order import default_num_streams
from megastruct.data.sources.retry import DEFAULT_PATIENCE_SECONDS
from megastruct.data.sources.shards import MANIFEST_NAME, TextShard, check_shards, find_shards
from megastruct.data.text.data import TextData
from megastruct.data.text.stream import TextSource
from megastruct.data.tokenizer import Tokenizer
from megastruct.data.tokens.data import TokenData, TokenSource, source_seed
from megastruct.data.tokens.manifest import TOKENIZER_NAME, Manifest, check_files, load_manifest
from megastruct.errors import Problem, Problems, UserError


def open_data(
    kind: str,
    path: str | Sequence[tuple[str, float]],
    tokenizer: str | None,
    *,
    seq_length: int,
    vocab_size: int,
    seed: int,
    text_column: str = "content",
    validation_fraction: float = 0.005,
    num_streams: int | None = None,
    num_workers: int = 0,
    patience_seconds: float = DEFAULT_PATIENCE_SECONDS,
    base_folder: Path | None = None,
    cache_folder: Path | None = None,
    hub_commits: Sequence[str | None] = (),
) -> TokenData | TextData:
    """Open token shards (kind "tokens") or text shards (kind "text") for training.

    Args:
        path: the folder of token shards; or a folder, glob, file or Hugging Face name of text shards; or several of
            them as (path, weight). Relative paths start at `base_folder`, the current directory if that is None.
        tokenizer: a SentencePiece model; token shards carry a copy, and a given one must equal it.
        seq_length: tokens per sample without the last label.
        vocab_size: the model's; at least the tokenizer's.
        seed: of the data order.
        text_column, validation_fraction, num_streams: for text only; token shards have them fixed.
        num_workers: processes of each reader that tokenise text; 0 for a thread of its own process.
        patience_seconds: how long a text shard that cannot be reached is tried again.
        hub_commits: of each path that is a Hugging Face name, the commit that it stands for if `cache_folder` has none.
        cache_folder: keeps what takes long to find in text shards (cache.py); not made without the folder above it.

    Raises:
        UserError: anything is missing, damaged or does not fit, with all problems that one look can find.
        ValueError: `kind` or a number is outside of what the config's checks allow.
    """
    _check_arguments(kind, seq_length, validation_fraction, num_streams)
    base_folder = (base_folder or Path()).absolute()
    model = base_folder / Path(tokenizer).expanduser() if tokenizer else None
    key, paths = ("data.path", [(path, 1.0)]) if isinstance(path, str) else ("data.path.{}", path)
    mixture = Mixture([weight for _, weight in paths])
    named = [(key.format(index), name) for index, (name, _) in enumerate(paths)]
    if kind == "tokens":
        folders = [(where, base_folder / Path(name).expanduser()) for where, name in named]
        sources, opened = _open_token_sources(folders, model, seq_length, vocab_size)
        return TokenData(sources, mixture, opened, seed)
    find = partial(
        _open_shards,
        text_column=text_column,
        num_streams=num_streams,
        patience_seconds=patience_seconds,
        base_folder=base_folder,
        cache_folder=cache_folder,
    )
    known = zip_longest(named, hub_commits[: len(named)])
    finds = [partial(find, name, where, commit=commit) for (where, name), commit in known]
    opened, shards = _open_text_sources(finds, model, vocab_size)
    texts = [
        TextSource(
            shards=own,
            tokenizer=opened,
            text_column=text_column,
            validation_fraction=validation_fraction,
            seed=source_seed(seed, index),
            num_streams=num_streams or default_num_streams(len(own)),
            patience_seconds=patience_seconds,
        )
        for index, own in enumerate(shards)
    ]
    return TextData(texts, mixture, seq_length, num_workers, cache_folder)


def _check_arguments(kind: str, seq_length: int, validation_fraction: float, num_streams: int | None) -> None:
    if kind not in ("tokens", "text"):
        raise ValueError(f"kind must be 'tokens' or 'text', got {kind!r}")
    if seq_length < 1 or not 0 <= validation_fraction < 1 or (num_streams is not None and num_streams < 1):
        raise ValueError("wanted: seq_length >= 1, 0 <= validation_fraction < 1, num_streams >= 1 or None")


def _open_token_sources(
    folders: list[tuple[str, Path]], model: Path | None, seq_length: int, vocab_size: int
) -> tuple[list[TokenSource], Tokenizer]:
    """`folders`: (its key in the config, folder)."""
    problems = Problems()
    found = [
        problems.collect(partial(_open_tokens, folder, where, model, seq_length, vocab_size))
        for where, folder in folders
    ]
    problems.raise_if_any()
    opened = [source for source in found if source is not None]
    _check_alike(opened)
    return [source for source, _ in opened], opened[0][1]


def _open_text_sources(
    finds: list[Callable[[], list[TextShard]]], model: Path | None, vocab_size: int
) -> tuple[Tokenizer, list[list[TextShard]]]:
    """`finds`: what finds the shards of each source."""
    problems = Problems()
    tokenizer = problems.collect(lambda: _open_text_tokenizer(model, vocab_size))
    shards = [problems.collect(find) for find in finds]
    problems.raise_if_any()
    assert tokenizer
    return tokenizer, [found for found in shards if found is not None]


def _open_text_tokenizer(model: Path | None, vocab_size: int) -> Tokenizer:
    if model is None:
        suggestion = "give a SentencePiece model, for example one made with tools/train_tokenizer.py"
        raise UserError(Problem("data.tokenizer", "is not set, and text shards need it", suggestion))
    tokenizer = Tokenizer(model, where="data.tokenizer")
    _check_vocab_size(tokenizer.vocab_size, vocab_size)
    return tokenizer


def _open_shards(
    path: str,
    where: str,
    *,
    text_column: str,
    num_streams: int | None,
    patience_seconds: float,
    base_folder: Path,
    cache_folder: Path | None,
    commit: str | None,
) -> list[TextShard]:
    shards = find_shards(path, where, base_folder, patience_seconds, cache_folder, commit)
    key = key_of([(shard.uri, shard.num_bytes) for shard in shards], text_column)
    cached_array(cache_folder, f"checked-{key}", lambda: _checked(shards, text_column, patience_seconds))
    if num_streams is not None and num_streams > len(shards):
        found = f"{num_streams} streams are more than the {len(shards)} text shards"
        raise UserError(Problem("data.num_streams", found, f"set it to {len(shards)} or less, or leave it out"))
    return shards


def _checked(shards: list[TextShard], text_column: str, patience_seconds: float) -> np.ndarray:
    """The number of shards, if all can be opened; thousands of footers are read for it."""
    check_shards(shards, text_column, patience_seconds)
    return np.array(len(shards))


def _open_tokens(
    folder: Path, where: str, model: Path | None, seq_length: int, vocab_size: int
) -> tuple[TokenSource, Tokenizer]:
    if not (folder / MANIFEST_NAME).is_file():
        what = f"has no {MANIFEST_NAME}" if folder.is_dir() else "is no folder"
        suggestion = "make token shards with tools/prepare_data.py, or read text directly with data.kind=text"
        raise UserError(Problem(where, f"{folder} {what}", suggestion))
    manifest = load_manifest(folder)
    problems = Problems()
    problems.collect(lambda: check_files(folder, manifest))
    tokenizer = problems.collect(lambda: _open_matching_tokenizer(folder, manifest, model))
    problems.collect(lambda: _check_vocab_size(manifest.settings.tokenizer.vocab_size, vocab_size))
    problems.raise_if_any()
    assert tokenizer
    return TokenSource.open(folder, manifest, seq_length, vocab_size), tokenizer


def _check_alike(sources: list[tuple[TokenSource, Tokenizer]]) -> None:
    """One tokenizer and one split: a document of two folders is held out from both or from none."""
    (first, tokenizer), *others = sources
    fraction = first.manifest.settings.validation_fraction
    for source, other in others:
        if other.fingerprint != tokenizer.fingerprint:
            found = f"{source.folder} was made with another tokenizer than {first.folder}"
            raise UserError(Problem("data.path", found, "make all folders with one tokenizer"))
        own = source.manifest.settings.validation_fraction
        if own != fraction:
            found = (
                f"{source.folder} was made with --validation-fraction {own}, {first.folder} with {fraction}: "
                "documents that one holds out would be trained on from the other"
            )
            suggestion = f"make it again with --validation-fraction {fraction}"
            raise UserError(Problem("data.path", found, suggestion))


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
