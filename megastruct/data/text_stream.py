"""One virtual stream of text: shards -> documents -> tokens -> rows of seq_length + 1, endless, without padding.

    document:   | d0 ........ eod | d1 ... eod | d2 ................ eod | ...
    row:        | row 0 ......... |
                               | row 1 ........ |         consecutive rows share one token, so that every token
                                              | row 2     but the stream's first is a label exactly once

The cursor of a stream is where its next row begins. It always points at a token, so resuming reads one shard and
tokenises again only from the document under the cursor on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megastruct.data.documents import Document, read_documents
from megastruct.data.order import shard_order
from megastruct.data.source import TextShard
from megastruct.data.split import is_validation
from megastruct.data.tokenizer import Tokenizer
from megastruct.errors import Problem, UserError


class StreamCursor(NamedTuple):
    """Where the next row of a stream begins: the columns of a text cursor, all int64."""

    epoch: int
    shard_position: int  # in the stream's order of that epoch
    document: int  # index in the shard
    token_offset: int  # in that document
    skipped_documents: int  # broken documents met by the stream before this place, in all epochs


CURSOR_COLUMNS = len(StreamCursor._fields)


@dataclass(frozen=True)
class TextSource:
    """What all streams of a run share."""

    shards: Sequence[TextShard]  # sorted
    tokenizer: Tokenizer
    text_column: str
    validation_fraction: float
    seed: int
    num_streams: int


class _Placed(NamedTuple):
    """A tokenised document and the cursor at its first token."""

    start: StreamCursor
    tokens: np.ndarray  # int32 [num_tokens], the last one is end-of-document


class TextStream:
    """Stream `stream` of `source`, from `cursor` on.

    `read_ahead` is a pool in which the next few documents are tokenised while the current ones are used (SentencePiece
    lets go of Python's lock). The cursor belongs to the rows that were taken, so reading ahead never shows in it.
    """

    def __init__(
        self,
        source: TextSource,
        stream: int,
        seq_length: int,
        cursor: StreamCursor | None = None,
        read_ahead: ThreadPoolExecutor | None = None,
    ) -> None:
        self._source = source
        self._stream = stream
        self._seq_length = seq_length
        self._start = cursor or StreamCursor(0, 0, 0, 0, 0)
        self._chunks = self._tokenised_documents(self._start)
        self._read_ahead = read_ahead
        self._pending: Future | None = None
        self._documents: deque[_Placed] = deque()  # [0] is the document in which the next row begins
        self._offset = self._start.token_offset

    @property
    def cursor(self) -> StreamCursor:
        """Where the next row begins."""
        if not self._documents:
            return self._start
        return self._documents[0].start._replace(token_offset=self._offset)

    def next_row(self) -> np.ndarray:
        """The next row, int64 [seq_length + 1].

        Raises:
            UserError: a shard is damaged, or a whole epoch of the stream has no document to train on.
        """
        row = np.empty(self._seq_length + 1, dtype=np.int64)
        filled, document = 0, 0
        offset = self._offset
        while True:
            while document >= len(self._documents):
                self._documents.extend(self._next_chunk())
            tokens = self._documents[document].tokens
            piece = tokens[offset : offset + len(row) - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            if filled == len(row):
                break
            document, offset = document + 1, 0
        for _ in range(document):
            self._documents.popleft()
        self._offset = offset + len(piece) - 1  # the row's last token is the first one of the next row
        return row

    def _next_chunk(self) -> list[_Placed]:
        if self._read_ahead is None:
            return next(self._chunks)
        chunk = self._pending.result() if self._pending else next(self._chunks)
        self._pending = self._read_ahead.submit(next, self._chunks)
        return chunk

    def _tokenised_documents(self, start: StreamCursor) -> Iterator[list[_Placed]]:
        """Documents to train on from `start` on, endlessly, a few at a time; lists may be empty."""
        source = self._source
        epoch, first_position, first_document, _, skipped = start
        while True:
            order = shard_order(len(source.shards), self._stream, source.num_streams, source.seed, epoch)
            num_documents = 0
            for position in range(first_position, len(order)):
                shard = source.shards[order[position]]
                for documents in read_documents(shard, source.text_column, first_document):
                    kept, skipped = self._to_train_on(documents, epoch, position, skipped)
                    num_documents += len(kept)
                    tokens = source.tokenizer.encode_documents([document.text for _, document in kept])
                    yield [_Placed(place, ids) for (place, _), ids in zip(kept, tokens, strict=True)]
                first_document = 0
            if not num_documents and not first_position:
                self._refuse_empty(order)
            epoch, first_position = epoch + 1, 0

    def _to_train_on(
        self, documents: list[Document], epoch: int, position: int, skipped: int
    ) -> tuple[list[tuple[StreamCursor, Document]], int]:
        """The documents of the training split with their places, and the number of broken ones so far."""
        kept = []
        for document in documents:
            if document.broken:
                skipped += 1
            elif not is_validation(document.content, self._source.validation_fraction):
                kept.append((StreamCursor(epoch, position, document.index, 0, skipped), document))
        return kept, skipped

    def _refuse_empty(self, order: np.ndarray) -> None:
        names = ", ".join(self._source.shards[index].name for index in order[:5])
        found = f"the {len(order)} shards of stream {self._stream} ({names}) hold no document to train on"
        suggestion = "remove these shards, lower data.num_streams, or check data.text_column"
        raise UserError(Problem("data.path", found, suggestion))
