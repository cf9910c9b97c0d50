"""Parquet shards: the text column is read a few rows at a time through a small buffer.

`datasets` is not used, because Arrow's dataset scanner, on which it builds, holds a whole row group in memory. A shard
written with default settings is a single row group of many GB.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

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

_BUFFER_BYTES = 1 << 20  # per column


class Parquet:
    """One document per row; see `DocumentFormat`."""

    endings = (".parquet", ".pq")
    damage = (pa.ArrowException,)

    def check(self, shard: TextShard, text_column: str) -> Problem | None:
        """As in `DocumentFormat`: the footer is damaged, or has no such column of text."""
        with _open(shard) as file:
            schema = file.schema_arrow
        return column_problem(shard, text_column, schema)

    def num_documents(self, shard: TextShard) -> int | None:
        """As in `DocumentFormat`: the number of rows in the footer."""
        with _open(shard) as file:
            return file.metadata.num_rows

    def documents(self, shard: TextShard, text_column: str, start: int) -> Iterator[list[Document]]:
        """As in `DocumentFormat`; row groups before `start` and other columns are not read."""
        index = start
        for column in _columns(shard, text_column, start):
            yield documents_of_column(index, column)
            index += len(column)


def _open(shard: TextShard) -> pq.ParquetFile:
    """The file, read through one buffer per column, so that only the requested bytes are read."""
    storage = storage_of(shard)
    file = shard.uri if shard.is_local else storage.open(shard)  # Arrow reads local files without holding the GIL
    return pq.ParquetFile(file, buffer_size=max(_BUFFER_BYTES, storage.request_bytes), pre_buffer=False)


def _columns(shard: TextShard, text_column: str, start: int) -> Iterator[pa.Array]:
    """The text column from row `start` on; row groups before `start` and other columns are not read."""
    with _open(shard) as file:
        if text_column not in file.schema_arrow.names:
            raise UserError(missing_column(shard, text_column, file.schema_arrow.names))
        first_group, to_skip = 0, start
        while first_group < file.num_row_groups and to_skip >= file.metadata.row_group(first_group).num_rows:
            to_skip -= file.metadata.row_group(first_group).num_rows
            first_group += 1
        groups = range(first_group, file.num_row_groups)
        for batch in file.iter_batches(_rows_per_read(file, text_column), row_groups=groups, columns=[text_column]):
            column = batch.column(0)[to_skip:]
            to_skip = max(0, to_skip - len(batch))
            if len(column):
                yield column


def _rows_per_read(file: pq.ParquetFile, text_column: str) -> int:
    """Number of rows that hold about BYTES_PER_READ of text in the row group with the longest documents."""
    groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
    sizes = [
        group.column(index).total_uncompressed_size / group.num_rows
        for group in groups
        if group.num_rows
        for index in range(group.num_columns)
        if group.column(index).path_in_schema == text_column
    ]
    return max(1, min(DOCUMENTS_PER_READ, int(BYTES_PER_READ / max([1, *sizes]))))
