"""What all tokenizers from a file have in common."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from megastruct.data.tokenizers.options import OPTIONS_FILE, TokenizerOptions, options_beside
from megastruct.errors import Problem, UserError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # the decoded form of bytes that are no character


class Ends(NamedTuple):
    """The tokens around a document; `options` says so in words, for copies of the tokenizer."""

    eod_id: int
    bos_id: int | None
    options: TokenizerOptions
    are_usual: bool  # whether the file alone, without options, means the same tokens


class FileTokenizer(ABC):
    """A tokenizer that is opened from one file; see `Tokenizer` in protocols.py.

    Raises:
        UserError: the file is missing, is not a tokenizer of its kind, or its end-of-document token is not known.
    """

    file_name: ClassVar[str]
    _suggestion: ClassVar[str]

    def __init__(self, path: str | Path, where: str = "", options: TokenizerOptions | None = None) -> None:
        """`where`: the config key or option of `path`, for messages. `options`: see `TokenizerOptions`."""
        self.path = Path(path).absolute()
        self._where = where
        self._content = self._read()
        self.vocab_size = self._load()
        ends = self._ends((options or TokenizerOptions()).over(options_beside(self.path)))
        self.eod_id, self.bos_id, self.options = ends.eod_id, ends.bos_id, ends.options
        kept = b"" if ends.are_usual else ends.options.to_json()
        self.files = {self.file_name: self._content} | ({OPTIONS_FILE: kept} if kept else {})
        self.fingerprint = hashlib.sha256(self._content + kept).hexdigest()

    @abstractmethod
    def _load(self) -> int:
        """Load `_content`; returns the number of ids."""

    @abstractmethod
    def _ends(self, options: TokenizerOptions) -> Ends:
        """Apply the options."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As in `Tokenizer`."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """As in `Tokenizer`."""

    @abstractmethod
    def pieces(self) -> dict[str, int]:
        """As in `Tokenizer`."""

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Like `encode`, with `bos_id` before every document, if there is one, and `eod_id` after it."""
        before, after = [] if self.bos_id is None else [self.bos_id], [self.eod_id]
        parts = np.array(before, np.int32), np.array(after, np.int32)
        return [np.concatenate([parts[0], ids, parts[1]]) for ids in self.encode(texts)]

    def num_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """As in `Tokenizer`."""
        ids = np.asarray(ids)
        text = self.decode(ids)
        cut = len(text) - len(text.rstrip(_REPLACEMENT))  # each stands for one byte, and has three
        is_whole = len(ids) > 0 and ids[-1] == self.eod_id
        return len(text.encode()) - (0 if is_whole else 2 * cut)

    def __reduce__(self) -> tuple[Any, ...]:  # worker processes load the file themselves
        return (_load_same, (type(self), self.path, self._where, self.options, self.fingerprint))

    def _read(self) -> bytes:
        if not self.path.is_file():
            raise self._error("does not exist" if not self.path.exists() else "is not a file")
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror})") from None
        if not content:  # SentencePiece accepts zero bytes as a model without pieces
            raise self._error("is empty (0 bytes)")
        return content

    def _error(self, what: str, suggestion: str | None = None) -> UserError:
        suggestion = suggestion or f"give {self._suggestion}"
        if self._where:
            return UserError(Problem(self._where, f"{self.path} {what}", suggestion))
        return UserError(Problem(str(self.path), what, suggestion))


@lru_cache(maxsize=1)  # a worker process gets the same tokenizer with every shard
def _load_same(
    kind: type[FileTokenizer], path: Path, where: str, options: TokenizerOptions, fingerprint: str
) -> FileTokenizer:
    """The tokenizer that was pickled.

    Raises:
        UserError: the file at `path` has been replaced since, or can no longer be read.
    """
    tokenizer = kind(path, where, options)
    if tokenizer.fingerprint != fingerprint:
        found = f"{path} was replaced by another model while this run was using it"
        raise UserError(
            Problem(where or str(path), found, "restore the original file, or start again with a new output")
        )
    return tokenizer
