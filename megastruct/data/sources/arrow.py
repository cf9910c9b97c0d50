"""Arrow files, as `save_to_disk` of `datasets` writes them (streams) and as Feather has them (with a footer)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from megastruct.data.sources.documents import (
    BYTES_PER_READ,
    DOCUMENTS_PER_READ,
    Document,
    column_problem,
    documents_of_column,
    missing_column,
)
from megastruct.data.sources.shards import TextShard
from megastruct.data.sources.storages import storage_of
from megastruct.errors import Problem, UserError

_BUFFER_BYTES = 1 << 20
_MAGIC = b"ARROW1"  # of files with a footer


class Arrow:
    """One document per row; see `DocumentFormat`."""

    endings = (".arrow", ".feather")
    damage = (pa.ArrowException,)

    def check(self, shard: TextShard, text_column: str) -> Problem | None:
        """As in `DocumentFormat`: the file is damaged or cut short, or has no such column of text."""
        with _opened(shard) as (file, is_stream):
            schema = (pa.ipc.open_stream(file) if is_stream else pa.ipc.open_file(file)).schema
            if is_stream:
                file.seek(max(0, shard.num_bytes - 4))
                if any(file.read(4)):  # a stream that ends between two batches looks whole but for its end mark
                    raise EOFError("the end mark of the stream is missing")
        return column_problem(shard, text_column, schema)

    def num_documents(self, shard: TextShard) -> int | None:
        """As in `DocumentFormat`: always None."""
        return None

    def documents(self, shard: TextShard, text_column: str, start: int) -> Iterator[list[Document]]:
        """As in `DocumentFormat`; a stream is read from its beginning, because it has no index."""
        index = 0
        with _opened(shard) as (file, is_stream):
            for column in _columns(shard, file, is_stream, text_column):
                size = _rows_per_read(column)
                for first in range(max(0, start - index), len(column), size):
                    yield documents_of_column(index + first, column[first : first + size])
                index += len(column)


@contextmanager
def _opened(shard: TextShard) -> Iterator[tuple[Any, bool]]:
    """The file at its first byte, and whether it is a stream.

    It is not mapped into memory, because a mapped file that disappears or fails ends the process.
    """
    storage = storage_of(shard)
    with io.BufferedReader(storage.open(shard), max(_BUFFER_BYTES, storage.request_bytes)) as file:
        is_stream = file.read(len(_MAGIC)) != _MAGIC
        file.seek(0)
        yield file, is_stream


def _columns(shard: TextShard, file: Any, is_stream: bool, text_column: str) -> Iterator[pa.Array]:
    """The text column of each record batch that is not empty."""
    schema = (pa.ipc.open_stream(file) if is_stream else pa.ipc.open_file(file)).schema
    if text_column not in schema.names:
        raise UserError(missing_column(shard, text_column, schema.names))
    options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(text_column)])
    file.seek(0)
    if is_stream:
        batches: Iterator[pa.RecordBatch] = iter(pa.ipc.open_stream(file, options=options))
    else:
        reader = pa.ipc.open_file(file, options=options)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    for batch in batches:
        if len(batch):
            yield batch.column(batch.schema.get_field_index(text_column))


def _rows_per_read(column: pa.Array) -> int:
    """Number of rows that hold about BYTES_PER_READ of text, at most DOCUMENTS_PER_READ."""
    return max(1, min(DOCUMENTS_PER_READ, int(BYTES_PER_READ / max(1, column.nbytes / len(column)))))
