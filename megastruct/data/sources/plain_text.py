"""Plain text: a file is one document."""

from __future__ import annotations

import io
from collections.abc import Iterator

from megastruct.data.sources.compression import DAMAGE, decompressed, with_compressed
from megastruct.data.sources.documents import Document, document_from_bytes
from megastruct.data.sources.shards import TextShard
from megastruct.data.sources.storages import storage_of
from megastruct.errors import Problem, UserError

MAX_BYTES = 256 << 20  # a document is held in memory several times: as bytes, as text and as token ids
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class PlainText:
    """One document per file, whatever the name of the text column is; see `DocumentFormat`."""

    endings = with_compressed(".txt", ".text")
    damage = DAMAGE

    def check(self, shard: TextShard, text_column: str) -> Problem | None:
        """As in `DocumentFormat`: the file is too large for a document."""
        return _too_large(shard) if shard.num_bytes > MAX_BYTES else None

    def num_documents(self, shard: TextShard) -> int | None:
        """As in `DocumentFormat`."""
        return 1

    def documents(self, shard: TextShard, text_column: str, start: int) -> Iterator[list[Document]]:
        """As in `DocumentFormat`.

        Raises:
            UserError: the file, decompressed, is too large for a document.
        """
        if start:
            return
        storage = storage_of(shard)
        with (
            io.BufferedReader(storage.open(shard), storage.request_bytes) as file,
            decompressed(file, shard.uri) as text,
        ):
            content = text.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(_too_large(shard))
        yield [document_from_bytes(0, content.removeprefix(_BYTE_ORDER_MARK))]


def _too_large(shard: TextShard) -> Problem:
    found = f"a text file is one document, and this one has more than {MAX_BYTES >> 20} MiB"
    return Problem(shard.uri, found, 'split it into documents: a .jsonl file with one {"content": "..."} per line')
