"""One text shard -> its token files and its record; what one worker process does at a time."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megastruct.data.documents import BROKEN_REASONS, read_documents
from megastruct.data.manifest import SPLITS, Count, Record, Splits, TokenFile
from megastruct.data.source import TextShard
from megastruct.data.split import is_validation
from megastruct.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class ShardJob:
    """All that a worker needs to know about one shard."""

    index: int  # in the sorted list of shards
    shard: TextShard
    output: Path
    record_path: Path
    tokenizer: Tokenizer
    text_column: str
    validation_fraction: float
    max_shard_tokens: int
    dtype: Literal["uint16", "uint32"]


class ShardRecord(Record):
    """What one text shard became."""

    splits: Splits
    skipped_documents: dict[str, Count]  # by reason, every reason is there


def make_shard(job: ShardJob, on_progress: Callable[[int, int], None]) -> ShardRecord:
    """Tokenise one shard; memory does not grow with its size.

    `on_progress` gets the documents (broken ones too) and tokens of every few documents.

    Raises:
        UserError: the shard is damaged.
    """
    writers = {split: _TokenWriter(job, split) for split in SPLITS}
    skipped = Counter(dict.fromkeys(BROKEN_REASONS, 0))
    try:
        for documents in read_documents(job.shard, job.text_column):
            whole = [document for document in documents if not document.broken]
            skipped.update(document.broken for document in documents if document.broken)
            tokens = job.tokenizer.encode_documents([document.text for document in whole])
            for document, ids in zip(whole, tokens, strict=True):
                split = SPLITS[is_validation(document.content, job.validation_fraction)]
                writers[split].write(ids)
            on_progress(len(documents), sum(map(len, tokens)))
        splits = Splits(**{split: tuple(writer.finish()) for split, writer in writers.items()})
    finally:
        for writer in writers.values():
            writer.discard()
    record = ShardRecord(splits=splits, skipped_documents=dict(skipped))
    write_atomically(job.record_path, record.model_dump_json().encode())
    return record


class _TokenWriter:
    """Writes the documents of one split of one shard to files of at most `max_shard_tokens` tokens."""

    def __init__(self, job: ShardJob, split: str) -> None:
        self._job = job
        self._split = split
        self._dtype = np.dtype(job.dtype).newbyteorder("<")
        self._finished: list[TokenFile] = []
        self._file = None

    def write(self, ids: np.ndarray) -> None:
        """Append one document, int [num_tokens] with its end-of-document id; it may be cut between two files."""
        while len(ids):
            if self._file is None:
                self._open()
            piece, ids = np.split(ids, [self._job.max_shard_tokens - self._num_tokens])
            content = piece.astype(self._dtype).tobytes()
            self._file.write(content)
            self._sha256.update(content)
            self._num_tokens += len(piece)
            self._num_documents += not len(ids)
            if self._num_tokens == self._job.max_shard_tokens:
                self._close()

    def finish(self) -> list[TokenFile]:
        if self._file is not None:
            self._close()
        return self._finished

    def discard(self) -> None:
        """Remove what an error left half written; without effect after `finish`."""
        if self._file is not None:
            self._file.close()
            self._aside.unlink(missing_ok=True)
            self._file = None

    def _open(self) -> None:
        name = f"{self._split}/{self._job.index:05d}-{len(self._finished):03d}.bin"
        self._name, self._path = name, self._job.output / name
        self._aside = _aside(self._path)
        self._file = self._aside.open("wb", buffering=1 << 20)
        self._sha256 = hashlib.sha256()
        self._num_tokens = self._num_documents = 0

    def _close(self) -> None:
        _finish_file(self._file, self._aside, self._path)
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


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there with all its content or not at all, whenever the process is killed."""
    aside = _aside(path)
    with aside.open("wb") as file:
        file.write(content)
        _finish_file(file, aside, path)


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".writing")


def _finish_file(file, aside: Path, path: Path) -> None:
    file.flush()
    os.fsync(file.fileno())  # the name must not reach the disk before the content
    file.close()
    os.replace(aside, path)
