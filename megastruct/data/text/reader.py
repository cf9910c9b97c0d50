"""The reader of text shards: the streams of one rank, and the rows that it is dealt from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megastruct.data.mixture import Mixture
from megastruct.data.order import locate_streams, rows_consumed, shard_order
from megastruct.data.reader import Reader
from megastruct.data.text.ahead import open_chunks
from megastruct.data.text.stream import (
    CURSOR_COLUMNS,
    START,
    StreamCursor,
    TextSource,
    TextStream,
)
from megastruct.data.text.worker import StreamName
from megastruct.errors import Problem, UserError


class TextReader(Reader):
    """Reads the virtual streams from which this rank is dealt samples; see `Reader`.

    A rank reads whole streams and drops the rows of other ranks. With one source, powers of two and num_streams up to
    dp_size * micro_batch_size, it reads at most micro_batch_size streams; in a mixture it may have to read all streams.

    Raises:
        UserError: `cursor` belongs to other data.
        ValueError: the sizes do not divide evenly, `cursor` is not merged, or it is missing for a later start.
    """

    def __init__(
        self,
        sources: Sequence[TextSource],
        mixture: Mixture,
        seq_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        cursor: np.ndarray | None,
        start_sample: int,
        num_workers: int = 0,
    ) -> None:
        super().__init__(global_batch_size, micro_batch_size, dp_rank, dp_size, start_sample)
        if cursor is None and start_sample:
            raise ValueError(f"reading text from sample {start_sample} needs the cursor that was taken there")
        self._sources = sources
        self._mixture = mixture
        self._seq_length = seq_length
        self._num_streams = np.array([source.num_streams for source in sources])
        self._first_row_of_cursor = np.concatenate([[0], np.cumsum(self._num_streams)])  # of each source
        starts = self._stream_cursors(cursor)
        own = mixture.streams_of_rank(self._num_streams.tolist(), start_sample, micro_batch_size, dp_rank, dp_size)
        chunks = open_chunks(self, sources, {name: starts[name] for name in own}, num_workers)
        self._streams = {name: TextStream(chunks[name], starts[name], seq_length) for name in own}
        self._rows_taken = self._rows_consumed(start_sample)

    @property
    def skipped_documents(self) -> int:
        """As in `Reader`."""
        return sum(stream.cursor.skipped_documents for stream in self._streams.values())

    def cursor(self) -> np.ndarray:
        """int64 [streams of all sources, 5]: epoch, shard position, document, token offset, skipped (StreamCursor).

        Streams that this rank does not own are rows of -1.
        """
        consumed = self._rows_consumed(self.samples_consumed())
        cursor = np.full((int(self._num_streams.sum()), CURSOR_COLUMNS), -1, dtype=np.int64)
        for name, stream in self._streams.items():
            # Other ranks may have taken the last rows of this step; all ranks must report the same place.
            self._advance(name, consumed[name])
            cursor[self._first_row_of_cursor[name[0]] + name[1]] = stream.cursor
        return cursor

    def _read(self, places: np.ndarray) -> np.ndarray:
        rows = np.empty((len(places), self._seq_length + 1), dtype=np.int64)
        sources, indices = self._mixture.locate(places)
        streams, rows_in_stream = locate_streams(indices, self._num_streams[sources])
        for i, place in enumerate(zip(sources.tolist(), streams.tolist(), rows_in_stream.tolist(), strict=True)):
            name = place[:2]
            self._advance(name, place[2])
            rows[i] = self._streams[name].next_row()
            self._rows_taken[name] += 1
        return rows

    def _advance(self, name: StreamName, row_in_stream: int) -> None:
        while self._rows_taken[name] < row_in_stream:
            self._streams[name].next_row()
            self._rows_taken[name] += 1

    def _rows_consumed(self, num_samples: int) -> dict[StreamName, int]:
        """Number of rows that the first `num_samples` global samples take from every stream."""
        return {
            (source, stream): rows_consumed(consumed, stream, num_streams)
            for source, (consumed, num_streams) in enumerate(
                zip(self._mixture.consumed(num_samples).tolist(), self._num_streams.tolist(), strict=True)
            )
            for stream in range(num_streams)
        }

    def _stream_cursors(self, cursor: np.ndarray | None) -> dict[StreamName, StreamCursor]:
        """The places at which all streams continue.

        Raises:
            UserError: the cursor belongs to other data.
            ValueError: the cursor is not merged over all ranks.
        """
        names = [(source, stream) for source, count in enumerate(self._num_streams) for stream in range(count)]
        if cursor is None:
            return dict.fromkeys(names, START)
        if cursor.shape != (len(names), CURSOR_COLUMNS):
            found = f"the checkpoint was saved with {len(cursor)} streams, but the text shards now give {len(names)}"
            suggestion = "restore its previous value and use the same text shards"
            if len(self._sources) == 1:
                suggestion = f"set it to {len(cursor)} and use the same text shards"
            raise UserError(Problem("data.num_streams", found, suggestion))
        return {name: self._place(name, row) for name, row in zip(names, cursor.tolist(), strict=True)}

    def _place(self, name: StreamName, row: list[int]) -> StreamCursor:
        source, stream = self._sources[name[0]], name[1]
        place = StreamCursor(*row)
        if min(place) < 0:
            raise ValueError(f"the cursor has no place for stream {stream}; merge the cursors of all ranks")
        num_positions = len(shard_order(len(source.shards), stream, source.num_streams, source.seed, 0))
        if place.shard_position >= num_positions:
            found = (
                f"the checkpoint continues at shard {place.shard_position} of stream {stream}, which has only "
                f"{num_positions} shards"
            )
            raise UserError(Problem("data.path", found, "resume with the text shards that the run was started with"))
        return place
