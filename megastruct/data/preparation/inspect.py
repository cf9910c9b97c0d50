"""Inspect a folder of token shards, and verify it against its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megastruct.data.tokenizers.open import open_tokenizer
from megastruct.data.tokens.manifest import SPLITS, Manifest, TokenFile
from megastruct.errors import Problem, UserError

_BLOCK_TOKENS = 1 << 22
_MAKE_AGAIN = "make the folder again with tools/prepare_data.py, or copy it again"


@dataclass(frozen=True)
class Lengths:
    """A histogram of document lengths in tokens, including the end-of-document id.

    `counts[k]` documents have at least 2^k and less than 2^(k + 1) tokens. Documents that were read only in part are
    not counted; `num_tokens` is the number of tokens read.
    """

    counts: np.ndarray  # int64 [num_bins]
    num_documents: int
    num_tokens: int
    longest: int
    mean: float


def verify(
    folder: Path, manifest: Manifest, num_threads: int = 4, on_file: Callable[[TokenFile], None] = lambda _: None
) -> list[Problem]:
    """Read every file and compare its size, sha256, number of documents and largest id with the manifest.

    `on_file` is called after each file. Returns one problem per file that differs.
    """
    files = [file for split in SPLITS for file in getattr(manifest.splits, split)]
    problems: list[Problem] = []
    with ThreadPoolExecutor(num_threads) as pool:
        for file, found in zip(files, pool.map(lambda file: _verify_file(folder, manifest, file), files), strict=True):
            problems += found
            on_file(file)
    return problems


def _verify_file(folder: Path, manifest: Manifest, file: TokenFile) -> list[Problem]:
    path, settings = folder / file.file, manifest.settings.tokenizer
    digest = hashlib.sha256()
    num_bytes = num_documents = largest = 0
    try:
        for block in _blocks(path, manifest.token_dtype):
            digest.update(block.data)
            num_bytes += block.nbytes
            num_documents += int(np.count_nonzero(block == settings.eod_id))
            largest = max(largest, int(block.max()))
    except OSError as error:
        return [Problem(str(path), f"cannot be read ({error.strerror})", _MAKE_AGAIN)]
    num_bytes = max(num_bytes, path.stat().st_size)
    found = []
    if num_bytes != file.num_bytes:
        found.append(f"has {num_bytes} bytes instead of {file.num_bytes}")
    elif digest.hexdigest() != file.sha256:
        found.append("has another sha256 than in the manifest")
    if num_documents != file.num_documents:
        found.append(f"contains the ends of {num_documents} documents instead of {file.num_documents}")
    if largest >= settings.vocab_size:
        found.append(f"contains token id {largest}, but ids must be below {settings.vocab_size}")
    return [Problem(str(path), "; ".join(found), _MAKE_AGAIN)] if found else []


def lengths(folder: Path, manifest: Manifest, split: str, max_tokens: int) -> Lengths:
    """Lengths of documents of `split`, from files spread evenly over it, until `max_tokens` have been read.

    Raises:
        UserError: a file cannot be read.
    """
    found: list[np.ndarray] = []
    num_tokens = 0
    for file in _spread(getattr(manifest.splits, split)):
        if num_tokens >= max_tokens:
            break
        ends, read = _document_ends(folder / file.file, manifest, max_tokens - num_tokens)
        num_tokens += read
        # A file whose name ends with -000 begins with a document; others may begin in the middle of one.
        found.append(np.diff(ends, prepend=-1) if file.file.endswith("-000.bin") else np.diff(ends))
    every = np.concatenate(found) if found else np.empty(0, np.int64)
    bins = np.floor(np.log2(every)).astype(np.int64) if len(every) else every
    return Lengths(
        counts=np.bincount(bins) if len(bins) else np.zeros(0, np.int64),
        num_documents=len(every),
        num_tokens=num_tokens,
        longest=int(every.max()) if len(every) else 0,
        mean=float(every.mean()) if len(every) else 0.0,
    )


def sample_documents(
    folder: Path, manifest: Manifest, split: str, num_samples: int, seed: int, max_tokens: int = 512
) -> Iterator[tuple[str, int, str]]:
    """(file, index of the first token, text) of documents of `split`, drawn at random with `seed`.

    The probability of a document is proportional to its length. The text is that of its first `max_tokens` tokens.

    Raises:
        UserError: a file cannot be read.
    """
    tokenizer = open_tokenizer(folder / manifest.settings.tokenizer.file)
    files: tuple[TokenFile, ...] = getattr(manifest.splits, split)
    ends = np.cumsum([file.num_tokens for file in files], dtype=np.int64)
    rng = np.random.default_rng(seed)
    for position in rng.integers(0, ends[-1], num_samples).tolist() if len(ends) else []:
        index = int(np.searchsorted(ends, position, side="right"))
        file = files[index]
        with _reading(folder / file.file):
            tokens = np.memmap(folder / file.file, dtype=manifest.token_dtype, mode="r")
        start = _start_of_document(tokens, position - int(ends[index]) + file.num_tokens, manifest)
        document = np.asarray(tokens[start : start + max_tokens])
        end = np.flatnonzero(document == manifest.settings.tokenizer.eod_id)
        yield file.file, start, tokenizer.decode(document[: end[0]] if len(end) else document)


def _start_of_document(tokens: np.ndarray, position: int, manifest: Manifest) -> int:
    """The first token of the document at `position`; 0 if the document begins in the file before."""
    while position > 0:
        begin = max(0, position - _BLOCK_TOKENS)
        ends = np.flatnonzero(tokens[begin:position] == manifest.settings.tokenizer.eod_id)
        if len(ends):
            return begin + int(ends[-1]) + 1
        position = begin
    return 0


def _document_ends(path: Path, manifest: Manifest, max_tokens: int) -> tuple[np.ndarray, int]:
    """(positions of end-of-document ids in a file, int64 [num_documents]; number of tokens read)."""
    ends, num_tokens = [np.empty(0, np.int64)], 0
    with _reading(path):
        for block in _blocks(path, manifest.token_dtype):
            block = block[: max_tokens - num_tokens]
            ends.append(num_tokens + np.flatnonzero(block == manifest.settings.tokenizer.eod_id))
            num_tokens += len(block)
            if num_tokens >= max_tokens:
                break
    return np.concatenate(ends), num_tokens


def _spread(files: tuple[TokenFile, ...]) -> Iterator[TokenFile]:
    """All files in bit-reversed order of their numbers, so that each is far from the ones before it."""
    num_bits = max(1, (len(files) - 1).bit_length())
    for number in range(1 << num_bits):
        index = int(f"{number:0{num_bits}b}"[::-1], 2)
        if index < len(files):
            yield files[index]


def _blocks(path: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while len(block := np.fromfile(file, dtype, _BLOCK_TOKENS)):
            yield block


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # numpy raises ValueError for an empty file
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(Problem(str(path), f"cannot be read ({reason})", _MAKE_AGAIN)) from None
