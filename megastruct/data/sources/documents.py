"""Documents of one text shard, in order, a few at a time, whatever the size of the shard.

A broken document (null, not a string, nothing but white space, not UTF-8, a line that is no JSON object) is handed on
as such, to be counted; a broken file is a `UserError`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from megastruct.data.sources.shards import (
    READ_ERRORS,
    TextShard,
    check_unchanged,
    missing_column,
    numbered_lines,
    open_parquet,
    parse_line,
)
from megastruct.errors import UserError

BROKEN_REASONS = ("null", "not_a_string", "empty", "undecodable", "unparsable")
DOCUMENTS_PER_READ = 64
_BYTES_PER_READ = 32 << 20  # fewer documents at once where they are large


class Document(NamedTuple):
    """One document; either `text` and `content` (the same in UTF-8) are set, or `broken` says why not."""

    index: int  # in its shard, broken ones counted; for JSON lines the line number
    text: str
    content: bytes
    broken: str | None  # one of BROKEN_REASONS


def documents_or_error(shard: TextShard, text_column: str, start: int) -> Iterator[list[Document]]:
    """Documents of `shard` from index `start` on, in lists of up to DOCUMENTS_PER_READ; only one column is read.

    What fails below comes as it is: one of READ_ERRORS, or what hub.of_the_network knows.

    Raises:
        UserError: the file lacks the column, or has changed since it was found.
    """
    check_unchanged(shard)
    reader = _read_parquet if shard.is_parquet else _read_jsonl
    yield from reader(shard, text_column, start)


def _read_parquet(shard: TextShard, text_column: str, start: int) -> Iterator[list[Document]]:
    index = start
    for column in _columns(shard, text_column, start):
        # Arrow hands out bytes: it would refuse a whole column for one value that is not UTF-8.
        contents = [None] * len(column) if pa.types.is_null(column.type) else column.cast(pa.large_binary()).to_pylist()
        yield [_from_bytes(index + i, content) for i, content in enumerate(contents)]
        index += len(contents)


def _columns(shard: TextShard, text_column: str, start: int) -> Iterator[pa.Array]:
    """The text column from row `start` on, read through a small buffer, from a disk and from the hub alike.

    Row groups before `start` and other columns are not read. Not by `datasets`, because Arrow's dataset scanner
    beneath it holds a whole row group in memory, and a shard written with default settings is one row group of many GB.
    """
    with open_parquet(shard) as file:
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


def num_rows(shard: TextShard) -> int | None:
    """Documents in a local parquet shard, broken ones too; None where only reading it would tell."""
    if not (shard.is_local and shard.is_parquet):
        return None
    try:
        return pq.read_metadata(shard.uri).num_rows
    except READ_ERRORS:
        return None  # whoever reads it says what is wrong


def _rows_per_read(file: pq.ParquetFile, text_column: str) -> int:
    """Rows that hold about _BYTES_PER_READ of text in the row group with the longest documents."""
    groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
    sizes = [
        group.column(index).total_uncompressed_size / group.num_rows
        for group in groups
        if group.num_rows
        for index in range(group.num_columns)
        if group.column(index).path_in_schema == text_column
    ]
    return max(1, min(DOCUMENTS_PER_READ, int(_BYTES_PER_READ / max([1, *sizes]))))


def _read_jsonl(shard: TextShard, text_column: str, start: int) -> Iterator[list[Document]]:
    """Line by line: the JSON reader of `datasets` parses megabytes at once, and one bad value ends all of them."""
    batch: list[Document] = []
    num_bytes = 0
    for line_number, line in numbered_lines(shard, start):
        batch.append(_from_line(text_column, line_number, line))
        num_bytes += len(line)
        if len(batch) == DOCUMENTS_PER_READ or num_bytes >= _BYTES_PER_READ:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _from_line(text_column: str, line_number: int, line: bytes) -> Document:
    try:
        values = parse_line(line)
    except UnicodeDecodeError:
        return Document(line_number, "", b"", "undecodable")
    except ValueError:
        return Document(line_number, "", b"", "unparsable")
    value = values.get(text_column)
    if value is not None and not isinstance(value, str):
        return Document(line_number, "", b"", "not_a_string")
    try:
        return _from_bytes(line_number, None if value is None else value.encode("utf-8"))
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no character
        return Document(line_number, "", b"", "undecodable")


def _from_bytes(index: int, content: bytes | None) -> Document:
    if content is None:
        return Document(index, "", b"", "null")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return Document(index, "", b"", "undecodable")
    if not text or text.isspace():
        return Document(index, "", b"", "empty")
    return Document(index, text, content, None)
