"""Training data read from token shards that tools/prepare_data.py made (kind: tokens)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megastruct.data.batch import Batch, batch_from_rows
from megastruct.data.manifest import Manifest, TokenFile, verify_files
from megastruct.data.order import locate_rows
from megastruct.data.reader import Reader, validation_samples
from megastruct.data.text_data import too_few_held_out_rows
from megastruct.data.tokenizer import Tokenizer
from megastruct.errors import Problem, UserError

_SAMPLES_AHEAD = 1024  # rows are located for so many samples at once: the permutation's cost is per call


class TokenRows:
    """The un-shuffled packing of one split: row k holds tokens [k * seq_length, k * seq_length + seq_length]."""

    def __init__(self, folder: Path, files: Sequence[TokenFile], dtype: np.dtype, seq_length: int, vocab_size: int):
        self._paths = [folder / file.file for file in files]
        self._ends = np.cumsum([file.num_tokens for file in files], dtype=np.int64)  # [num_files]
        self._seq_length = seq_length
        self._vocab_size = vocab_size
        try:
            self._tokens = [np.memmap(path, dtype=dtype, mode="r") for path in self._paths]
        except OSError as error:
            raise UserError(Problem(str(error.filename or folder), f"cannot be read ({error.strerror})")) from None
        self.num_tokens = int(self._ends[-1]) if len(files) else 0
        self.num_rows = max(0, self.num_tokens - 1) // seq_length

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of `rows` (int64 [n], each in [0, num_rows)) as int64 [n, seq_length + 1].

        Raises:
            UserError: a token id is not in [0, vocab_size): names the file.
        """
        tokens = np.empty((len(rows), self._seq_length + 1), dtype=np.int64)
        starts = rows * self._seq_length
        files = np.searchsorted(self._ends, starts, side="right")
        for row, file, start in zip(tokens, files.tolist(), starts.tolist(), strict=True):
            self._fill(row, file, start)
        if tokens.size and tokens.max() >= self._vocab_size:
            self._refuse_id(rows[np.argmax(tokens.max(axis=1))])
        return tokens

    def _fill(self, row: np.ndarray, file: int, start: int) -> None:
        """Copy len(row) tokens from position `start` on, which lies in `file`; a row may cross into later files."""
        filled = 0
        while filled < len(row):
            offset = start + filled - (int(self._ends[file - 1]) if file else 0)
            piece = self._tokens[file][offset : offset + len(row) - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            file += 1

    def _refuse_id(self, row: int) -> None:
        positions = row * self._seq_length + np.arange(self._seq_length + 1)
        files = np.searchsorted(self._ends, positions, side="right")
        for position, file in zip(positions.tolist(), files.tolist(), strict=True):
            token = int(self._tokens[file][position - (int(self._ends[file - 1]) if file else 0)])
            if token >= self._vocab_size:
                found = f"holds token id {token}, ids must be below model.vocab_size = {self._vocab_size}"
                suggestion = "the file is damaged: make the folder again with tools/prepare_data.py"
                raise UserError(Problem(str(self._paths[file]), found, suggestion))


class TokenReader(Reader):
    """Reads rows in the order of the seeded permutation of each epoch; see `Reader`."""

    skipped_documents = 0  # prepare_data left them out and counted them in the manifest

    def __init__(
        self,
        rows: TokenRows,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        start_sample: int,
    ) -> None:
        super().__init__(global_batch_size, micro_batch_size, dp_rank, dp_size, start_sample)
        self._rows = rows
        self._seed = seed
        self._located: deque[np.ndarray] = deque()  # rows of the steps to come, [num_micro_batches, micro_batch] each

    def cursor(self) -> np.ndarray:
        """int64 [1, 1]: global samples consumed."""
        return np.array([[self.samples_consumed()]], dtype=np.int64)

    def _read(self, places: np.ndarray) -> np.ndarray:
        return self._rows.read(places)

    def _next_step(self) -> np.ndarray:
        if not self._located:
            num_steps = max(1, _SAMPLES_AHEAD * self._dp_size // self._global_batch_size)
            first_samples = self._next_step_sample + self._global_batch_size * np.arange(num_steps)
            samples = np.stack([self._deal(first) for first in first_samples.tolist()])
            self._located.extend(locate_rows(samples, self._rows.num_rows, self._seed))
        return self._located.popleft()


class TokenData:
    """A folder of token shards, checked and ready to be read.

    Raises:
        UserError: the training tokens do not fill one row, or a file cannot be opened.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, tokenizer: Tokenizer, seq_length: int, vocab_size: int, seed: int
    ) -> None:
        self.tokenizer = tokenizer
        self._folder = folder
        self._manifest = manifest
        self._seed = seed
        files, dtype = manifest.splits, manifest.token_dtype
        self._train = TokenRows(folder, files.train, dtype, seq_length, vocab_size)
        self._validation = TokenRows(folder, files.validation, dtype, seq_length, vocab_size)
        if not self._train.num_rows:
            found = f"{folder} has {self._train.num_tokens} training tokens, one row takes {seq_length + 1}"
            raise UserError(Problem("data.path", found, "give more text, or lower training.seq_length"))

    cursor_shape = (1, 1)

    def skipped_documents(self, cursor: np.ndarray) -> int:
        """Broken documents that prepare_data passed over; `cursor` does not change it."""
        return sum(self._manifest.skipped_documents.values())

    def describe(self) -> dict:
        """Plain values for the record of a run."""
        manifest = self._manifest
        return {
            "kind": "tokens",
            "num_shards": len(manifest.splits.train),
            "num_bytes": sum(file.num_bytes for file in manifest.splits.train),
            "num_streams": 1,
            "num_train_tokens": self._train.num_tokens,
            "num_validation_tokens": self._validation.num_tokens,
            "samples_per_epoch": self._train.num_rows,
            "validation_fraction": manifest.settings.validation_fraction,
            "text_column": manifest.settings.text_column,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "vocab_size": self.tokenizer.vocab_size,
        }

    def verify(self) -> None:
        """Read every file and compare it with the manifest's sha256; UserError names all that differ."""
        verify_files(self._folder, self._manifest)

    def train_reader(
        self,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        cursor: np.ndarray | None = None,
        start_sample: int = 0,
    ) -> TokenReader:
        """This rank's micro-batches from `cursor` (or, without it, from global sample `start_sample`) on.

        Raises:
            ValueError: the cursor is not one of token shards.
        """
        if cursor is not None:
            if cursor.shape != (1, 1) or cursor[0, 0] < 0:
                raise ValueError(f"a cursor of token shards has the shape (1, 1), got {cursor.shape}")
            start_sample = int(cursor[0, 0])
        sizes = (global_batch_size, micro_batch_size, dp_rank, dp_size)
        return TokenReader(self._train, self._seed, *sizes, start_sample)

    def validation_batches(self, num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[Batch]:
        """This rank's part of the first `num_samples` rows of the packed held-out documents.

        Raises:
            UserError: there are fewer rows.
            ValueError: num_samples does not divide by micro_batch_size * dp_size.
        """
        own = validation_samples(num_samples, micro_batch_size, dp_rank, dp_size)
        if self._validation.num_rows < num_samples:
            fraction = self._manifest.settings.validation_fraction
            raise too_few_held_out_rows(self._validation.num_rows, num_samples, fraction)
        return [batch_from_rows(self._validation.read(part)) for part in own]
