"""Documents as they are read from a shard of any format.

A broken document (null, not a string, only white space, not UTF-8, a line that is not a JSON object) is passed on and
counted. A broken file is a `UserError`.
"""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

from megastruct.data.sources.shards import TextShard
from megastruct.errors import Problem

BROKEN_REASONS = ("null", "not_a_string", "empty", "undecodable", "unparsable")
DOCUMENTS_PER_READ = 64
BYTES_PER_READ = 32 << 20  # large documents are read fewer at a time
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
COLUMN_SUGGESTION = "name the column that holds the text (data.text_column, or --text-column of the tools)"


class Document(NamedTuple):
    """One document. Either `text` and `content` (the text in UTF-8) are set, or `broken` gives the reason why not."""

    # Index in the shard, including broken documents; the line number in a JSONL file.
    index: int  # type: ignore[assignment]
    text: str
    content: bytes
    broken: str | None  # one of BROKEN_REASONS


def broken_document(index: int, reason: str) -> Document:
    """A document that cannot be used; `reason` is one of BROKEN_REASONS."""
    return Document(index, "", b"", reason)


def document_from_bytes(index: int, content: bytes | None) -> Document:
    """The document with this UTF-8 content, or a broken one if it is null, empty, only white space or not UTF-8."""
    if content is None:
        return broken_document(index, "null")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return broken_document(index, "undecodable")
    if not text or text.isspace():
        return broken_document(index, "empty")
    return Document(index, text, content, None)


def missing_column(shard: TextShard, text_column: str, names: list[str]) -> Problem:
    """The problem of a shard whose columns `names` lack `text_column`."""
    found = f"column {text_column!r} is missing; the columns are: {', '.join(names) or 'none'}"
    return Problem(shard.uri, found, COLUMN_SUGGESTION)


def column_problem(shard: TextShard, text_column: str, schema: pa.Schema) -> Problem | None:
    """The problem of an Arrow or parquet shard: it has no such column, or the column does not hold text."""
    if text_column not in schema.names:
        return missing_column(shard, text_column, schema.names)
    column_type = schema.field(text_column).type
    if pa.types.is_dictionary(column_type):
        column_type = column_type.value_type
    if str(column_type) in _TEXT_TYPES:
        return None
    found = f"column {text_column!r} has the type {column_type}, which is not text"
    return Problem(shard.uri, found, COLUMN_SUGGESTION)


def documents_of_column(index: int, column: pa.Array) -> list[Document]:
    """The documents of a column of text; `index` is that of the first."""
    null = pa.types.is_null(column.type)
    # As bytes, because Arrow would reject a whole column for one value that is not UTF-8.
    contents = [None] * len(column) if null else column.cast(pa.large_binary()).to_pylist()
    return [document_from_bytes(index + i, content) for i, content in enumerate(contents)]
