"""Open token shards for training (kind: tokens)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megastruct.data.opening import check_vocab_size
from megastruct.data.options import DataOptions
from megastruct.data.protocols import Tokenizer
from megastruct.data.sources.fsspec_address import is_address
from megastruct.data.tokenizers.open import open_tokenizer
from megastruct.data.tokens.data import TokenData, TokenSource
from megastruct.data.tokens.fetch import fetch_folder
from megastruct.data.tokens.manifest import MANIFEST_NAME, Manifest, check_files, load_manifest
from megastruct.errors import Problem, Problems, UserError


def open_tokens(options: DataOptions) -> TokenData:
    """Check the folders of all sources, and the tokenizer that they were made with.

    Raises:
        UserError: with everything that is missing, damaged or does not fit the config.
    """
    problems = Problems()
    found = [problems.collect(partial(_open_folder, options, where, path)) for where, path in options.paths]
    problems.raise_if_any()
    opened = [pair for pair in found if pair is not None]
    _check_alike(opened)
    sources, tokenizer = [source for source, _ in opened], opened[0][1]
    return TokenData(sources, options.mixture, tokenizer, options.seed)


def _open_folder(options: DataOptions, where: str, path: str) -> tuple[TokenSource, Tokenizer]:
    if is_address(path):
        folder = fetch_folder(path, where, options.data.token_cache, options.data.patience_seconds)
    else:
        folder = Path(path).expanduser().absolute()
    if not (folder / MANIFEST_NAME).is_file():
        what = f"has no {MANIFEST_NAME}" if folder.is_dir() else "is not a folder"
        suggestion = "make token shards with tools/prepare_data.py, or read text directly with data.kind=text"
        raise UserError(Problem(where, f"{folder} {what}", suggestion))
    manifest = load_manifest(folder)
    problems = Problems()
    problems.collect(lambda: check_files(folder, manifest))
    tokenizer = problems.collect(lambda: _open_matching_tokenizer(folder, manifest, options.tokenizer_path))
    problems.collect(lambda: check_vocab_size(manifest.settings.tokenizer.vocab_size, options.vocab_size))
    problems.raise_if_any()
    assert tokenizer
    return TokenSource.open(folder, manifest, options.seq_length, options.vocab_size), tokenizer


def _open_matching_tokenizer(folder: Path, manifest: Manifest, given: Path | None) -> Tokenizer:
    """The given tokenizer, or else the folder's own.

    Raises:
        UserError: it is not the tokenizer that made the tokens, or cannot be read.
    """
    wanted = manifest.settings.tokenizer
    if given is not None:
        tokenizer = open_tokenizer(given, "data.tokenizer")
        where, suggestion = "data.tokenizer", f"leave it out, because the folder has its own {wanted.file}"
    else:
        tokenizer = open_tokenizer(folder / wanted.file)
        where, suggestion = str(tokenizer.path), "make the folder again with tools/prepare_data.py, or copy it again"
    if tokenizer.fingerprint != wanted.fingerprint:
        found = (
            f"{tokenizer.path} is not the tokenizer that {folder} was made with "
            f"(sha256 {tokenizer.fingerprint[:12]}... instead of {wanted.fingerprint[:12]}...)"
        )
        raise UserError(Problem(where, found, suggestion))
    return tokenizer


def _check_alike(sources: list[tuple[TokenSource, Tokenizer]]) -> None:
    """Check that all sources have the same tokenizer and validation fraction.

    With different fractions, a document in two folders could be held out in one and trained on in the other.
    """
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
                "documents that one folder holds out would be trained on in the other"
            )
            suggestion = f"make it again with --validation-fraction {fraction}"
            raise UserError(Problem("data.path", found, suggestion))
