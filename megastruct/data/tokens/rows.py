"""The packing of tokens that lie in many files: rows of a fixed length over one stream of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megastruct.data.tokens.files import TokenFiles
from megastruct.errors import Problem, UserError

_TOKENS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Segments:
    """Pieces of files that follow each other in a stream of tokens; int64 [num_segments] each.

    Attributes:
        files: index of the file of each segment.
        offsets: the first token of each segment within its file.
        lengths: tokens of each segment, at least 1.
    """

    files: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray

    @classmethod
    def whole(cls, num_tokens: Sequence[int]) -> Segments:
        """All of each file, by the number of its tokens."""
        count = len(num_tokens)
        return cls(np.arange(count), np.zeros(count, np.int64), np.array(num_tokens, np.int64))


class TokenRows:
    """The unshuffled packing of one split: row k holds tokens k * seq_length to (k + 1) * seq_length, both included.

    Attributes:
        num_tokens: number of tokens of the split.
        num_rows: number of whole rows.
        row_tokens: tokens of a row, with the last label.
    """

    def __init__(
        self, paths: Sequence[Path], files: TokenFiles, segments: Segments, seq_length: int, vocab_size: int
    ) -> None:
        """`paths`: of the files, for messages."""
        self._paths, self._files, self._segments = paths, files, segments
        self._ends = np.cumsum(segments.lengths, dtype=np.int64)  # [num_segments]
        self._seq_length, self._vocab_size = seq_length, vocab_size
        self.num_tokens = int(self._ends[-1]) if len(self._ends) else 0
        self.row_tokens = seq_length + 1
        self.num_rows = max(0, self.num_tokens - 1) // seq_length

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of `rows` (int64 [n], each in [0, num_rows)) as int64 [n, seq_length + 1].

        Raises:
            UserError: a token id is not in [0, vocab_size), or a file cannot be read; the message names the file.
        """
        tokens = np.empty((len(rows), self._seq_length + 1), dtype=np.int64)
        starts = rows * self._seq_length
        segments = np.searchsorted(self._ends, starts, side="right")
        for row, segment, start in zip(tokens, segments.tolist(), starts.tolist(), strict=True):
            self._fill(row, segment, start)
        if tokens.size and not self._all_known(tokens):
            for row, start in zip(tokens, starts.tolist(), strict=True):
                self._refuse_unknown(row, start)
        return tokens

    def chunks(self) -> Iterator[np.ndarray]:
        """All tokens of the stream in order, in arrays int64 [n].

        Raises:
            UserError: as in `read`.
        """
        for start in range(0, self.num_tokens, _TOKENS_AT_ONCE):
            tokens = np.empty(min(_TOKENS_AT_ONCE, self.num_tokens - start), dtype=np.int64)
            self._fill(tokens, int(np.searchsorted(self._ends, start, side="right")), start)
            if not self._all_known(tokens):
                self._refuse_unknown(tokens, start)
            yield tokens

    def will_read(self, rows: np.ndarray) -> None:
        """Ask the system to prefetch `rows` (int64 [n]), which will be read soon."""
        starts = rows * self._seq_length
        for segment, start in zip(
            np.searchsorted(self._ends, starts, side="right").tolist(), starts.tolist(), strict=True
        ):
            file, offset = self._place(segment, start)
            self._files.will_read(file, offset, self._seq_length + 1)

    def _fill(self, tokens: np.ndarray, segment: int, start: int) -> None:
        """Fill `tokens` from position `start` on, which is in `segment`; later segments may be needed, too."""
        filled = 0
        while filled < len(tokens):
            file, offset = self._place(segment, start + filled)
            count = min(len(tokens) - filled, int(self._ends[segment]) - start - filled)
            tokens[filled : filled + count] = self._files.read(file, offset, count)
            filled += count
            segment += 1

    def _place(self, segment: int, position: int) -> tuple[int, int]:
        """(file, token within it) of a position of the stream that is in `segment`."""
        before_end = int(self._ends[segment]) - position
        parts = self._segments
        return int(parts.files[segment]), int(parts.offsets[segment] + parts.lengths[segment]) - before_end

    def _all_known(self, tokens: np.ndarray) -> bool:
        return bool(tokens.min() >= 0 and tokens.max() < self._vocab_size)

    def _refuse_unknown(self, tokens: np.ndarray, start: int) -> None:
        """Name the file of the first token outside the vocabulary, if there is one; `tokens` begin at `start`."""
        unknown = np.flatnonzero((tokens < 0) | (tokens >= self._vocab_size))
        if len(unknown):
            position = start + int(unknown[0])
            file, offset = self._place(int(np.searchsorted(self._ends, position, side="right")), position)
            found = (
                f"contains token id {int(tokens[unknown[0]])} (token {offset:,} of the file), but ids must be below "
                f"model.vocab_size = {self._vocab_size}"
            )
            suggestion = "the file is damaged or was made with another tokenizer; make it again, for example with "
            raise UserError(Problem(str(self._paths[file]), found, suggestion + "tools/prepare_data.py"))
