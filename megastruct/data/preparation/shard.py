"""Tokenise one text shard into its token files and its record, which is the unit of work of a worker process."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megastruct.data.kept import NO_TOKENS, tokenised
from megastruct.data.protocols import Tokenizer
from megastruct.data.sources.changes import refuse_changed
from megastruct.data.sources.documents import BROKEN_REASONS
from megastruct.data.sources.patience import DEFAULT_PATIENCE_SECONDS
from megastruct.data.sources.reading import current_state, num_documents, read_patiently
from megastruct.data.sources.shards import TextShard
from megastruct.data.split import is_validation
from megastruct.data.tokens.manifest import SPLITS, Count, Record, Splits, TokenFile
from megastruct.errors import Problem, UserError
from megastruct.files import NewFile, write_atomically


class OutputError(UserError):
    """The output cannot be written. Unlike a damaged shard, this stops all workers immediately."""

    @classmethod
    def of(cls, path: Path, error: OSError) -> OutputError:
        """The error for `path`, which the system refused to write with `error`."""
        found = f"cannot be written ({error.strerror or error})"
        suggestion = "free disk space or fix permissions, then run the same command again; finished shards are kept"
        return cls(Problem(str(path), found, suggestion))

    def __reduce__(self) -> tuple[Any, ...]:
        return (OutputError, (self.problems, self.headline, self.on_all_ranks))


@dataclass(frozen=True)
class ShardJob:
    """Everything that a worker needs to tokenise one shard."""

    index: int  # in the sorted list of shards
    shard: TextShard
    output: Path
    record_path: Path
    tokenizer: Tokenizer
    validation_fraction: float  # 1: all documents are held out
    max_shard_tokens: int
    dtype: Literal["uint16", "uint32"]
    patience_seconds: float = DEFAULT_PATIENCE_SECONDS

    def source_version(self) -> str:
        """The version of the shard, which changes whenever it is written; see `FileState`."""
        return current_state(self.shard, self.patience_seconds).version


class ShardRecord(Record):
    """The result of tokenising one text shard."""

    splits: Splits
    skipped_documents: dict[str, Count]  # by reason, including reasons with 0 documents
    source_version: str  # the version of the shard that was read


def make_shard(job: ShardJob, on_progress: Callable[[int, int, int], None]) -> ShardRecord:
    """Tokenise one shard. Memory use does not grow with its size.

    `on_progress` is called after every few documents with the number of documents (including broken ones), of tokens,
    and approximately of bytes of the shard that were read since the last call.

    Raises:
        OutputError: a token file cannot be written.
        UserError: the shard is damaged, cannot be reached, or was changed while it was read.
    """
    try:
        version = job.source_version()
    except FileNotFoundError:
        raise _changed(job) from None
    try:
        record = _make_files(job, version, on_progress)
        write_atomically(job.record_path, record.model_dump_json().encode())
    except OSError as error:  # errors of reading have become UserErrors before
        path = Path(error.filename) if error.filename else job.output
        raise OutputError.of(path, error) from None
    return record


def _make_files(job: ShardJob, version: str, on_progress: Callable[[int, int, int], None]) -> ShardRecord:
    writers = {split: _TokenWriter(job, split) for split in SPLITS}
    skipped = Counter(dict.fromkeys((*BROKEN_REASONS, NO_TOKENS), 0))
    try:
        rows = num_documents(job.shard)
        left_bytes = job.shard.num_bytes  # a compressed shard holds more bytes of text than its file has
        for documents in read_patiently(job.shard, job.shard.text_column, patience_seconds=job.patience_seconds):
            kept, reasons = tokenised(job.tokenizer, documents)
            skipped.update(reason for reason in reasons if reason)
            for document, ids in kept:
                split = SPLITS[is_validation(document.content, job.validation_fraction)]
                writers[split].write(ids)
            num_bytes = sum(len(document.content) for document in documents)
            part = min(left_bytes, job.shard.num_bytes * len(documents) // rows if rows else num_bytes)
            left_bytes -= part
            on_progress(len(documents), sum(len(ids) for _, ids in kept), part)
        _refuse_changed(job, version)
        splits = Splits(**{split: tuple(writer.finish()) for split, writer in writers.items()})
    finally:
        for writer in writers.values():
            writer.discard()
    return ShardRecord(splits=splits, skipped_documents=dict(skipped), source_version=version)


def _refuse_changed(job: ShardJob, version: str) -> None:
    """Raise UserError if the shard has been changed since `version`: what was read may be a mix of old and new."""
    try:
        state = current_state(job.shard, job.patience_seconds)
        refuse_changed(job.shard, state)
        if state.version == version:
            return
    except FileNotFoundError:
        pass
    raise _changed(job)


def _changed(job: ShardJob) -> UserError:
    found = "was changed or removed while it was read"
    return UserError(
        Problem(job.shard.uri, found, "wait until it is completely written, then run the same command again")
    )


class _TokenWriter:
    """Writes the documents of one split of one shard to files of at most `max_shard_tokens` tokens."""

    def __init__(self, job: ShardJob, split: str) -> None:
        self._job = job
        self._split = split
        self._dtype = np.dtype(job.dtype).newbyteorder("<")
        self._finished: list[TokenFile] = []
        self._file: NewFile | None = None

    def write(self, ids: np.ndarray) -> None:
        """Append one document, int [num_tokens] including its end-of-document id; it may be split between two files."""
        while len(ids):
            file = self._file or self._open()
            piece, ids = np.split(ids, [self._job.max_shard_tokens - self._num_tokens])
            content = piece.astype(self._dtype).tobytes()
            file.write(content)
            self._sha256.update(content)
            self._num_tokens += len(piece)
            self._num_documents += not len(ids)
            if self._num_tokens == self._job.max_shard_tokens:
                self._close(file)

    def finish(self) -> list[TokenFile]:
        if self._file is not None:
            self._close(self._file)
        return self._finished

    def discard(self) -> None:
        """Remove what an error left half written; without effect after `finish`."""
        if self._file is not None:
            self._file.discard()
            self._file = None

    def _open(self) -> NewFile:
        name = f"{self._split}/{self._job.index:05d}-{len(self._finished):03d}.bin"
        self._name, self._file = name, NewFile(self._job.output / name)
        self._sha256 = hashlib.sha256()
        self._num_tokens = self._num_documents = 0
        return self._file

    def _close(self, file: NewFile) -> None:
        file.finish()
        self._file = None
        self._finished.append(
            TokenFile(
                file=self._name,
                num_tokens=self._num_tokens,
                num_documents=self._num_documents,
                num_bytes=self._num_tokens * self._dtype.itemsize,
                sha256=self._sha256.hexdigest(),
            )
        )
