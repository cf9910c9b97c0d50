"""Training data read from text shards while training runs (kind: text)."""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from megastruct.data.batch import Batch, batch_from_rows
from megastruct.data.documents import read_documents
from megastruct.data.order import locate_streams, rows_consumed, shard_order, streams_of_rank
from megastruct.data.reader import Reader, validation_samples
from megastruct.data.split import is_validation
from megastruct.data.text_stream import CURSOR_COLUMNS, StreamCursor, TextSource, TextStream
from megastruct.data.tokenizer import Tokenizer
from megastruct.errors import Problem, UserError


class TextReader(Reader):
    """Reads the virtual streams that this rank is dealt samples from; see `Reader`.

    A rank walks through whole streams and drops the rows of others: with powers of two and num_streams up to
    dp_size * micro_batch_size, that is micro_batch_size streams at most.
    """

    def __init__(
        self,
        source: TextSource,
        seq_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        cursor: np.ndarray | None,
        start_sample: int,
    ) -> None:
        super().__init__(global_batch_size, micro_batch_size, dp_rank, dp_size, start_sample)
        if cursor is None and start_sample:
            raise ValueError(f"text cannot start at sample {start_sample} without the cursor that belongs to it")
        self._num_streams = source.num_streams
        self._seq_length = seq_length
        pool = ThreadPoolExecutor(1, thread_name_prefix="tokenise")
        weakref.finalize(self, pool.shutdown, wait=False, cancel_futures=True)  # nobody waits for what is not read
        self._streams = {
            stream: TextStream(source, stream, seq_length, _stream_cursor(source, stream, cursor), pool)
            for stream in streams_of_rank(source.num_streams, start_sample, micro_batch_size, dp_rank, dp_size)
        }
        self._rows_taken = {stream: rows_consumed(start_sample, stream, source.num_streams) for stream in self._streams}

    @property
    def skipped_documents(self) -> int:
        return sum(stream.cursor.skipped_documents for stream in self._streams.values())

    def cursor(self) -> np.ndarray:
        """int64 [num_streams, 5]: epoch, shard position, document, token offset, skipped documents (StreamCursor).

        Streams that this rank does not own are rows of -1.
        """
        consumed = self.samples_consumed()
        cursor = np.full((self._num_streams, CURSOR_COLUMNS), -1, dtype=np.int64)
        for stream in self._streams:
            # Other ranks may have taken the stream's last rows of the step; all of them must say the same place.
            self._advance(stream, rows_consumed(consumed, stream, self._num_streams))
            cursor[stream] = self._streams[stream].cursor
        return cursor

    def _read(self, places: np.ndarray) -> np.ndarray:
        rows = np.empty((len(places), self._seq_length + 1), dtype=np.int64)
        streams, rows_in_stream = locate_streams(places, self._num_streams)
        for i, (stream, row_in_stream) in enumerate(zip(streams.tolist(), rows_in_stream.tolist(), strict=True)):
            self._advance(stream, row_in_stream)
            rows[i] = self._streams[stream].next_row()
            self._rows_taken[stream] += 1
        return rows

    def _advance(self, stream: int, row_in_stream: int) -> None:
        while self._rows_taken[stream] < row_in_stream:
            self._streams[stream].next_row()
            self._rows_taken[stream] += 1


def _stream_cursor(source: TextSource, stream: int, cursor: np.ndarray | None) -> StreamCursor | None:
    """The place where `stream` goes on.

    Raises:
        UserError: the cursor was made for other data.
        ValueError: it was not merged over all ranks.
    """
    if cursor is None:
        return None
    if cursor.shape != (source.num_streams, CURSOR_COLUMNS):
        found = f"the checkpoint was made with {len(cursor)} streams, the text shards now give {source.num_streams}"
        raise UserError(Problem("data.num_streams", found, f"set it to {len(cursor)} and use the same text shards"))
    place = StreamCursor(*cursor[stream].tolist())
    if min(place) < 0:
        raise ValueError(f"the cursor says nothing about stream {stream}; merge the cursors of all ranks")
    num_positions = len(shard_order(len(source.shards), stream, source.num_streams, source.seed, 0))
    if place.shard_position >= num_positions:
        found = f"the checkpoint stands in shard {place.shard_position} of stream {stream}, which has {num_positions}"
        raise UserError(Problem("data.path", found, "resume with the text shards that the run was started with"))
    return place


class TextData:
    """Text shards, checked and ready to be read."""

    def __init__(self, source: TextSource, seq_length: int) -> None:
        self._source = source
        self._seq_length = seq_length

    @property
    def tokenizer(self) -> Tokenizer:
        return self._source.tokenizer

    @property
    def cursor_shape(self) -> tuple[int, int]:
        return (self._source.num_streams, CURSOR_COLUMNS)

    @staticmethod
    def skipped_documents(cursor: np.ndarray) -> int:
        """Broken documents passed over so far, from the merged cursor of all ranks."""
        return int(cursor[:, -1].sum())

    def describe(self) -> dict:
        """Plain values for the record of a run; what only reading everything could tell is None."""
        source = self._source
        return {
            "kind": "text",
            "num_shards": len(source.shards),
            "num_bytes": sum(shard.num_bytes for shard in source.shards),
            "num_streams": source.num_streams,
            "num_train_tokens": None,
            "num_validation_tokens": None,
            "samples_per_epoch": None,
            "validation_fraction": source.validation_fraction,
            "text_column": source.text_column,
            "tokenizer_fingerprint": source.tokenizer.fingerprint,
            "vocab_size": source.tokenizer.vocab_size,
        }

    def train_reader(
        self,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        cursor: np.ndarray | None = None,
        start_sample: int = 0,
    ) -> TextReader:
        """This rank's micro-batches from global sample `start_sample` on, where the merged `cursor` was taken."""
        sizes = (global_batch_size, micro_batch_size, dp_rank, dp_size)
        return TextReader(self._source, self._seq_length, *sizes, cursor, start_sample)

    def validation_batches(self, num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[Batch]:
        """This rank's part of the first `num_samples` rows of the packed held-out documents.

        Shards are read in the order of their names, and only as far as needed.

        Raises:
            UserError: there are fewer rows.
            ValueError: num_samples does not divide by micro_batch_size * dp_size.
        """
        own = validation_samples(num_samples, micro_batch_size, dp_rank, dp_size)
        tokens = self._held_out_tokens(num_samples * self._seq_length + 1)
        num_rows = max(0, len(tokens) - 1) // self._seq_length
        if num_rows < num_samples:
            raise too_few_held_out_rows(num_rows, num_samples, self._source.validation_fraction)
        starts = own * self._seq_length
        return [batch_from_rows(tokens[part[:, None] + np.arange(self._seq_length + 1)]) for part in starts]

    def _held_out_tokens(self, num_tokens: int) -> np.ndarray:
        """The first `num_tokens` tokens of the held-out documents, int64; fewer if there are no more."""
        source = self._source
        parts: list[np.ndarray] = []
        missing = num_tokens if source.validation_fraction > 0 else 0
        for shard in source.shards:
            if missing <= 0:
                break
            for documents in read_documents(shard, source.text_column):
                texts = [
                    document.text
                    for document in documents
                    if not document.broken and is_validation(document.content, source.validation_fraction)
                ]
                found = source.tokenizer.encode_documents(texts)
                parts += found
                missing -= sum(map(len, found))
                if missing <= 0:
                    break
        return np.concatenate([np.empty(0, np.int64), *parts])[:num_tokens]


def too_few_held_out_rows(num_rows: int, num_samples: int, validation_fraction: float) -> UserError:
    """The user's message when the held-out documents do not fill `num_samples` rows."""
    found = f"{num_samples} rows are wanted, the held-out documents fill {num_rows}"
    suggestion = f"set it to {num_rows} or less, or " if num_rows else ""
    suggestion += f"hold out more documents (the validation fraction is {validation_fraction})"
    return UserError(Problem("evaluation.num_samples", found, suggestion))
