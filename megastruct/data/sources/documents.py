"""Documents as they come out of a shard of any format.

A broken document (null, not a string, nothing but white space, not UTF-8, a line that is no JSON object) is handed on
as such, to be counted; a broken file is a `UserError`.
"""

from __future__ import annotations

from typing import NamedTuple

from megastruct.data.sources.shards import TextShard
from megastruct.errors import Problem

BROKEN_REASONS = ("null", "not_a_string", "empty", "undecodable", "unparsable")
DOCUMENTS_PER_READ = 64
BYTES_PER_READ = 32 << 20  # fewer documents at once where they are large
COLUMN_SUGGESTION = "name the column that holds the text (data.text_column, or --text-column of the tools)"


class Document(NamedTuple):
    """One document; either `text` and `content` (the same in UTF-8) are set, or `broken` says why not."""

    # In its shard, broken ones counted; for JSON lines the line number.
    index: int  # type: ignore[assignment]
    text: str
    content: bytes
    broken: str | None  # one of BROKEN_REASONS


def broken_document(index: int, reason: str) -> Document:
    """`reason`: one of BROKEN_REASONS."""
    return Document(index, "", b"", reason)


def document_from_bytes(index: int, content: bytes | None) -> Document:
    """The document with this content in UTF-8, or a broken one if it is null, empty, white space or not UTF-8."""
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
    found = f"column {text_column!r} is missing; the columns are: {', '.join(names)}"
    return Problem(shard.uri, found, COLUMN_SUGGESTION)
