"""One virtual stream of text: shards -> documents -> tokens -> rows of seq_length + 1, endless, without padding.

    document:   | d0 ........ eod | d1 ... eod | d2 ................ eod | ...
    row:        | row 0 ......... |
                               | row 1 ........ |         consecutive rows share one token, so that every token
                                              | row 2     except the first of the stream is a label exactly once

The cursor of a stream is the token at which its next row begins. Resuming opens one shard and tokenises from the
document under the cursor on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megastruct.data.kept import tokenised
from megastruct.data.order import shard_order
from megastruct.data.protocols import Tokenizer
from megastruct.data.sources.documents import Document
from megastruct.data.sources.patience import DEFAULT_PATIENCE_SECONDS
from megastruct.data.sources.reading import read_patiently
from megastruct.data.sources.shards import TextShard
from megastruct.data.split import is_validation
from megastruct.errors import Problem, UserError


class StreamCursor(NamedTuple):
    """Where the next row of a stream begins: the columns of a text cursor, all int64."""

    epoch: int
    shard_position: int  # in the stream's order of that epoch
    document: int  # index within the shard
    token_offset: int  # in that document
    skipped_documents: int  # broken or empty documents that the stream has skipped before this place, in all epochs


CURSOR_COLUMNS = len(StreamCursor._fields)
START = StreamCursor(0, 0, 0, 0, 0)


@dataclass(frozen=True)
class TextSource:
    """One source of text: its shards, and the settings that all its streams share."""

    shards: Sequence[TextShard]  # sorted, with their text columns
    tokenizer: Tokenizer
    validation_fraction: float
    seed: int
    num_streams: int
    patience_seconds: float = DEFAULT_PATIENCE_SECONDS
    held_out_shards: Sequence[TextShard] = ()  # all of their documents are held out, and `validation_fraction` is 0
    commits: tuple[str | None, ...] = ()  # of each place of the source, None if it is not on the hub

    @property
    def text_columns(self) -> list[str]:
        """The columns that hold the text of the shards, each once."""
        return sorted({shard.text_column for shard in self.shards})


class Placed(NamedTuple):
    """A tokenised document and the cursor at its first token."""

    start: StreamCursor
    tokens: np.ndarray  # int32 [num_tokens], the last one is end-of-document


class TextStream:
    """Cuts tokenised documents into rows. `chunks` yields the documents in order, a few at a time, from `start` on.

    `chunks` may be ahead of the rows that were taken; the cursor is that of the rows.
    """

    def __init__(self, chunks: Iterator[list[Placed]], start: StreamCursor, seq_length: int) -> None:
        self._chunks = chunks
        self._start = start
        self._seq_length = seq_length
        self._documents: deque[Placed] = deque()  # [0] is the document in which the next row begins
        self._offset = start.token_offset

    @property
    def cursor(self) -> StreamCursor:
        """Where the next row begins."""
        if not self._documents:
            return self._start
        return self._documents[0].start._replace(token_offset=self._offset)

    def next_row(self) -> np.ndarray:
        """The next row, int64 [seq_length + 1].

        Raises:
            UserError: a shard is damaged or unreachable, or a whole epoch of the stream has no document to train on.
        """
        row = np.empty(self._seq_length + 1, dtype=np.int64)
        filled = document = 0
        offset = self._offset
        while True:
            while document == len(self._documents):
                self._documents.extend(next(self._chunks))
            piece = self._documents[document].tokens[offset : offset + len(row) - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            if filled == len(row):
                break
            document, offset = document + 1, 0
        for _ in range(document):
            self._documents.popleft()
        self._offset = offset + len(piece) - 1  # the row's last token is the first one of the next row
        return row


def tokenised_documents(
    source: TextSource, stream: int, start: StreamCursor, watch: Callable[[str, str], None] | None = None
) -> Iterator[list[Placed]]:
    """The training documents of one stream from `start` on, endlessly, in lists of a few; lists may be empty.

    `watch` is called with the address of a shard and "" when it is opened, and with the error when reading it fails.

    Raises:
        UserError: a shard is damaged or unreachable, or a whole epoch of the stream has no document to train on.
    """
    epoch, first_position, first_document, _, skipped = start
    while True:
        order = shard_order(len(source.shards), stream, source.num_streams, source.seed, epoch)
        num_documents = 0
        for position in range(first_position, len(order)):
            shard = source.shards[order[position]]
            reading = read_patiently(shard, shard.text_column, first_document, source.patience_seconds, watch)
            for documents in reading:
                placed, skipped = _placed(source, documents, epoch, position, skipped)
                num_documents += len(placed)
                yield placed
            first_document = 0
        if not num_documents and not first_position:
            _refuse_empty(source, stream, order)
        epoch, first_position = epoch + 1, 0


def _placed(
    source: TextSource, documents: list[Document], epoch: int, position: int, skipped: int
) -> tuple[list[Placed], int]:
    """The tokenised documents to train on, and the number of documents that were skipped so far."""
    is_wanted = lambda document: not is_validation(document.content, source.validation_fraction)  # noqa: E731
    kept, reasons = tokenised(source.tokenizer, documents, is_wanted)
    ids_of = {document.index: ids for document, ids in kept}
    placed = []
    for document, reason in zip(documents, reasons, strict=True):
        skipped += reason is not None
        if document.index in ids_of:
            placed.append(Placed(StreamCursor(epoch, position, document.index, 0, skipped), ids_of[document.index]))
    return placed, skipped


def _refuse_empty(source: TextSource, stream: int, order: np.ndarray) -> None:
    names = ", ".join(source.shards[index].name for index in order[:5])
    found = f"the {len(order)} shards of stream {stream} ({names}) contain no document to train on"
    suggestion = "remove these shards, lower data.num_streams, or check data.text_column"
    raise UserError(Problem("data.path", found, suggestion))
