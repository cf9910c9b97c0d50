"""Open token shards, or token files of Megatron-LM, for training (kind: tokens)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megastruct.data.opening import check_vocab_size
from megastruct.data.options import DataOptions
from megastruct.data.protocols import Tokenizer
from megastruct.data.sources.fsspec_address import is_address
from megastruct.data.tokenizers.open import open_tokenizer
from megastruct.data.tokenizers.options import TokenizerOptions, options_beside
from megastruct.data.tokens.data import TokenData, TokenSource
from megastruct.data.tokens.fetch import fetch_folder
from megastruct.data.tokens.manifest import MANIFEST_NAME, Manifest, check_files, load_manifest
from megastruct.data.tokens.megatron import Pair, find_pairs, open_pairs
from megastruct.errors import Problem, Problems, UserError


def open_tokens(options: DataOptions) -> TokenData:
    """Check the files of all sources, and the tokenizer that they were made with.

    Raises:
        UserError: with everything that is missing, damaged or does not fit the config.
    """
    problems = Problems()
    found = [problems.collect(partial(_open_source, options, where, path)) for where, path in options.paths]
    problems.raise_if_any()
    opened = [pair for pair in found if pair is not None]
    _check_alike(opened)
    sources, tokenizer = [source for source, _ in opened], opened[0][1]
    return TokenData(sources, options.mixture, tokenizer, options.seed)


def _open_source(options: DataOptions, where: str, path: str) -> tuple[TokenSource, Tokenizer]:
    if is_address(path):
        folder = fetch_folder(path, where, options.data.token_cache, options.data.patience_seconds)
    else:
        folder = Path(path).expanduser().absolute()
    if (folder / MANIFEST_NAME).is_file():
        return _open_folder(options, folder)
    if pairs := find_pairs(str(folder)):
        return _open_megatron(options, folder, pairs)
    what = f"has no {MANIFEST_NAME} and no .idx file of Megatron-LM" if folder.is_dir() else "is not a folder"
    suggestion = "make token shards with tools/prepare_data.py, or read text directly with data.kind=text"
    raise UserError(Problem(where, f"{folder} {what}", suggestion))


def _open_megatron(options: DataOptions, path: Path, pairs: Sequence[Pair]) -> tuple[TokenSource, Tokenizer]:
    if options.tokenizer_path is None:
        found = f"is not set, but {path} does not say which tokenizer made it"
        raise UserError(Problem("data.tokenizer", found, "data.tokenizer=PATH of the tokenizer that made it"))
    tokenizer = open_tokenizer(options.tokenizer_path, "data.tokenizer", options.tokenizer_options)
    check_vocab_size(tokenizer.vocab_size, options.vocab_size)
    fraction = options.data.validation_fraction
    files = open_pairs(pairs, tokenizer, fraction, "data.tokenizer")
    train, validation = files.rows(options.seq_length, options.vocab_size)
    num_bytes = sum(file.stat().st_size for file in files.paths)
    source = TokenSource(path, train, validation, len(pairs), num_bytes, fraction, options.data.text_column or "")
    return source, tokenizer


def _open_folder(options: DataOptions, folder: Path) -> tuple[TokenSource, Tokenizer]:
    manifest = load_manifest(folder)
    problems = Problems()
    problems.collect(lambda: check_files(folder, manifest))
    tokenizer = problems.collect(lambda: _open_matching_tokenizer(folder, manifest, options))
    problems.collect(lambda: check_vocab_size(manifest.settings.tokenizer.vocab_size, options.vocab_size))
    problems.raise_if_any()
    assert tokenizer
    return TokenSource.open(folder, manifest, options.seq_length, options.vocab_size), tokenizer


def _open_matching_tokenizer(folder: Path, manifest: Manifest, options: DataOptions) -> Tokenizer:
    """The given tokenizer, or else the folder's own.

    Raises:
        UserError: it is not the tokenizer that made the tokens, or cannot be read.
    """
    wanted, given = manifest.settings.tokenizer, options.tokenizer_path
    kept = options_beside(folder / wanted.file)
    chosen = options.tokenizer_options.over(kept)
    if given is not None:
        tokenizer = open_tokenizer(given, "data.tokenizer", chosen)
        where, suggestion = "data.tokenizer", f"leave it out, because the folder has its own {wanted.file}"
    else:
        tokenizer = open_tokenizer(folder / wanted.file, "", chosen)
        where, suggestion = str(tokenizer.path), "make the folder again with tools/prepare_data.py, or copy it again"
    if tokenizer.fingerprint != wanted.fingerprint:
        _refuse_other_options(folder, options.tokenizer_options, open_tokenizer(folder / wanted.file))
        found = (
            f"{tokenizer.path} is not the tokenizer that {folder} was made with "
            f"(sha256 {tokenizer.fingerprint[:12]}... instead of {wanted.fingerprint[:12]}...)"
        )
        raise UserError(Problem(where, found, suggestion))
    return tokenizer


def _refuse_other_options(folder: Path, chosen: TokenizerOptions, own: Tokenizer) -> None:
    """Raise UserError with every choice of the config that the tokens of `folder` were not made with."""
    kept = vars(getattr(own, "options", chosen))
    problems = [
        Problem(f"data.{key}", f"is {value!r}, but {folder} was made with {kept[key]!r}", "leave it out")
        for key, value in vars(chosen).items()
        if value is not None and value != kept[key]
    ]
    if problems:
        raise UserError(problems)


def _check_alike(sources: list[tuple[TokenSource, Tokenizer]]) -> None:
    """Check that all sources have the same tokenizer and validation fraction.

    With different fractions, a document in two folders could be held out in one and trained on in the other.
    """
    (first, tokenizer), *others = sources
    fraction = first.validation_fraction
    for source, other in others:
        if other.fingerprint != tokenizer.fingerprint:
            found = f"{source.path} was made with another tokenizer than {first.path}"
            raise UserError(Problem("data.path", found, "make all folders with one tokenizer"))
        own = source.validation_fraction
        if own != fraction:
            found = (
                f"{source.path} has the validation fraction {own}, {first.path} has {fraction}: "
                "documents that one of them holds out would be trained on in the other"
            )
            suggestion = f"make token shards with --validation-fraction {fraction}, or give Megatron's files "
            suggestion += f"data.validation_fraction={fraction}"
            raise UserError(Problem("data.path", found, suggestion))
