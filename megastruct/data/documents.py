"""Documents of one text shard, in order, a few at a time, whatever the size of the shard.

A broken document (null, not a string, nothing but white space, not UTF-8) is handed on as such, to be counted;
a broken file is a `UserError`.
"""

from __future__ import annotations

import glob
import itertools
import logging
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from megastruct.data.source import READ_ERRORS, TextShard, missing_column, numbered_lines, parse_line, unreadable
from megastruct.errors import UserError

BROKEN_REASONS = ("null", "not_a_string", "empty", "undecodable")
DOCUMENTS_PER_READ = 64
_BUFFER_BYTES = 1 << 20


class Document(NamedTuple):
    """One document; either `text` and `content` (the same in UTF-8) are set, or `broken` says why not."""

    index: int  # in its shard, broken ones counted; for JSON lines the line number
    text: str
    content: bytes
    broken: str | None  # one of BROKEN_REASONS


def read_documents(shard: TextShard, text_column: str, start: int = 0) -> Iterator[list[Document]]:
    """Documents of `shard` from index `start` on, in lists of up to DOCUMENTS_PER_READ; only one column is read.

    Raises:
        UserError: the file is damaged, cut short, not reachable, or lacks the column.
    """
    reader = _read_parquet if shard.is_parquet else _read_jsonl
    documents = reader(shard, text_column, start)
    while True:
        try:
            batch = next(documents, None)
        except READ_ERRORS as error:
            raise unreadable(shard, error) from None
        if batch is None:
            return
        yield batch


def _read_parquet(shard: TextShard, text_column: str, start: int) -> Iterator[list[Document]]:
    columns = _local_columns(shard, text_column, start) if shard.is_local else _streamed(shard, text_column, start)
    index = start
    for column in columns:
        # Arrow hands out bytes: it would refuse a whole column for one value that is not UTF-8.
        contents = [None] * len(column) if pa.types.is_null(column.type) else column.cast(pa.large_binary()).to_pylist()
        yield [_from_bytes(index + i, content) for i, content in enumerate(contents)]
        index += len(contents)


def _local_columns(shard: TextShard, text_column: str, start: int) -> Iterator[pa.Array]:
    """The text column from row `start` on, read through a small buffer.

    Row groups before `start` are not read. Not by `datasets`, because Arrow's dataset scanner beneath it holds a
    whole row group in memory, and a shard written with default settings is one row group of many GB.
    """
    with pq.ParquetFile(shard.uri, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
        if text_column not in file.schema_arrow.names:
            raise UserError(missing_column(shard, text_column, file.schema_arrow.names))
        first_group, to_skip = 0, start
        while first_group < file.num_row_groups and to_skip >= file.metadata.row_group(first_group).num_rows:
            to_skip -= file.metadata.row_group(first_group).num_rows
            first_group += 1
        groups = range(first_group, file.num_row_groups)
        for batch in file.iter_batches(DOCUMENTS_PER_READ, row_groups=groups, columns=[text_column]):
            column = batch.column(0)[to_skip:]
            to_skip = max(0, to_skip - len(batch))
            if len(column):
                yield column


def _streamed(shard: TextShard, text_column: str, start: int) -> Iterator[pa.Array]:
    """The text column from row `start` on, streamed by Hugging Face `datasets`, which tries again when a network fails.

    It holds one row group in memory (about a thousand documents in the shards of the hub).
    """
    import datasets  # slow to import, and local shards do not need it

    # The library logs what it raises, and we say it in our own message; the progress bars are per file.
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        stream = datasets.load_dataset(
            "parquet",
            data_files=glob.escape(shard.uri) if shard.is_local else shard.uri,
            split="train",
            streaming=True,
            columns=[text_column],
            batch_size=DOCUMENTS_PER_READ,
        )
    except (ValueError, KeyError) as error:  # the library's words for "no usable file" and "no such column"
        raise unreadable(shard, error) from None
    if text_column not in (stream.features or {}):
        raise UserError(missing_column(shard, text_column, list(stream.features or {})))
    for table in stream.skip(start).with_format("arrow").iter(DOCUMENTS_PER_READ):
        yield table.column(text_column)


def _read_jsonl(shard: TextShard, text_column: str, start: int) -> Iterator[list[Document]]:
    """Line by line: the JSON reader of `datasets` parses megabytes at once, and one bad value ends all of them."""
    lines = numbered_lines(shard, start)
    while batch := list(itertools.islice(lines, DOCUMENTS_PER_READ)):
        yield [_from_line(shard, text_column, line_number, line) for line_number, line in batch]


def _from_line(shard: TextShard, text_column: str, line_number: int, line: bytes) -> Document:
    try:
        value = parse_line(shard, line_number, line).get(text_column)
    except UnicodeDecodeError:
        return Document(line_number, "", b"", "undecodable")
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
