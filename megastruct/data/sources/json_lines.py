"""JSONL shards, read line by line.

The JSON reader of `datasets` is not used: it parses megabytes at once, and one bad value makes all of them fail.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

from megastruct.data.sources.compression import DAMAGE, decompressed, with_compressed
from megastruct.data.sources.documents import (
    BYTES_PER_READ,
    DOCUMENTS_PER_READ,
    Document,
    broken_document,
    document_from_bytes,
    missing_column,
)
from megastruct.data.sources.shards import TextShard
from megastruct.data.sources.storages import storage_of
from megastruct.errors import Problem

_NUM_CHECKED = 100
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonLines:
    """One JSON object per line; the index of a document is its line number from 0, including blank lines."""

    endings = with_compressed(".jsonl", ".ndjson", ".json")
    damage = DAMAGE

    def check(self, shard: TextShard, text_column: str) -> Problem | None:
        """As in `DocumentFormat`: the column is missing in the first 100 lines, or none of them is a JSON object.

        A single bad line is a broken document and no problem of the file.
        """
        names: dict[str, None] = {}
        first_mistake: Problem | None = None
        num_good = 0
        for _, (line_number, line) in zip(range(_NUM_CHECKED), _numbered_lines(shard), strict=False):
            try:
                values = _parse(line)
            except ValueError as error:
                found = f"none of the first lines is a JSON object (line {line_number + 1}: {error})"
                suggestion = "give one JSON object per line, or download the file again"
                first_mistake = first_mistake or Problem(shard.uri, found, suggestion)
                continue
            if text_column in values:
                return None
            num_good += 1
            names |= dict.fromkeys(values)
        return missing_column(shard, text_column, list(names)) if num_good else first_mistake

    def num_documents(self, shard: TextShard) -> int | None:
        """As in `DocumentFormat`: always None."""
        return None

    def documents(self, shard: TextShard, text_column: str, start: int) -> Iterator[list[Document]]:
        """As in `DocumentFormat`; lines before `start` are read and skipped."""
        batch: list[Document] = []
        num_bytes = 0
        for line_number, line in _numbered_lines(shard, start):
            batch.append(_document(text_column, line_number, line))
            num_bytes += len(line)
            if len(batch) == DOCUMENTS_PER_READ or num_bytes >= BYTES_PER_READ:
                yield batch
                batch, num_bytes = [], 0
        if batch:
            yield batch


def _numbered_lines(shard: TextShard, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """(line number from 0, bytes) of every line that is not blank, from line `start` on."""
    storage = storage_of(shard)
    with (
        io.BufferedReader(storage.open(shard), storage.request_bytes) as file,
        decompressed(file, shard.uri) as lines,
    ):
        for line_number, line in enumerate(lines):
            if line_number >= start and line.strip():
                yield line_number, line.removeprefix(_BYTE_ORDER_MARK) if line_number == 0 else line


def _document(text_column: str, line_number: int, line: bytes) -> Document:
    try:
        values = _parse(line)
    except UnicodeDecodeError:
        return broken_document(line_number, "undecodable")
    except ValueError:
        return broken_document(line_number, "unparsable")
    value = values.get(text_column)
    if value is not None and not isinstance(value, str):
        return broken_document(line_number, "not_a_string")
    try:
        return document_from_bytes(line_number, None if value is None else value.encode("utf-8"))
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair, which is not a character
        return broken_document(line_number, "undecodable")


def _parse(line: bytes) -> dict[str, Any]:
    """The JSON object in a line.

    Raises:
        UnicodeDecodeError: the line is not UTF-8.
        ValueError: the line is not a JSON object.
    """
    text = line.decode("utf-8")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"a JSON {type(values).__name__}, not an object")
    return values
