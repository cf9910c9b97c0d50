"""Training data that is read as tokens: the shards of tools/prepare_data.py, or files of Megatron (kind: tokens)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megastruct.data.batch import Batch, batch_from_rows
from megastruct.data.mixture import Mixture
from megastruct.data.order import locate_rows, source_seed
from megastruct.data.prefetch import Prefetched
from megastruct.data.protocols import Tokenizer
from megastruct.data.reader import Reader, check_held_out_rows, describe_mixture, rows_of_sources, validation_samples
from megastruct.data.tokens.files import TokenFiles
from megastruct.data.tokens.manifest import SPLITS, Manifest
from megastruct.data.tokens.rows import Segments, TokenRows
from megastruct.errors import Problem, UserError

# Rows are located, and prefetched by the system, for this many samples of a rank at once, as each call of the
# permutation has a fixed cost.
_SAMPLES_AHEAD = 1024


@dataclass(frozen=True)
class TokenSource:
    """One source of tokens, whose files have been checked, with the rows of its two splits.

    Attributes:
        path: the folder of token shards, or what the config says of other files.
        num_shards: files with training tokens.
        num_bytes: of those files.
        validation_fraction: share of the documents that is held out.
        text_column: the column that the tokens were made of.
        skipped_documents: broken documents that were left out when the tokens were made.
    """

    path: Path
    train: TokenRows
    validation: TokenRows
    num_shards: int
    num_bytes: int
    validation_fraction: float
    text_column: str
    skipped_documents: int = 0

    def __post_init__(self) -> None:
        if not self.train.num_rows:
            found = (
                f"{self.path} has {self.train.num_tokens} training tokens, but one row takes {self.train.row_tokens}"
            )
            raise UserError(Problem("data.path", found, "give more text, or lower training.seq_length"))

    @classmethod
    def open(cls, folder: Path, manifest: Manifest, seq_length: int, vocab_size: int) -> TokenSource:
        """The source of a folder of token shards with this manifest.

        Raises:
            UserError: the training tokens do not fill one row.
        """
        train, validation = (shard_rows(folder, manifest, split, seq_length, vocab_size) for split in SPLITS)
        files = manifest.splits.train
        return cls(
            folder,
            train,
            validation,
            num_shards=len(files),
            num_bytes=sum(file.num_bytes for file in files),
            validation_fraction=manifest.settings.validation_fraction,
            text_column=manifest.settings.text_column,
            skipped_documents=sum(manifest.skipped_documents.values()),
        )


def shard_rows(folder: Path, manifest: Manifest, split: str, seq_length: int, vocab_size: int) -> TokenRows:
    """The rows of one split of a folder of token shards."""
    files = getattr(manifest.splits, split)
    paths, num_tokens = [folder / file.file for file in files], [file.num_tokens for file in files]
    opened = TokenFiles(paths, manifest.token_dtype)
    return TokenRows(paths, opened, Segments.whole(num_tokens), seq_length, vocab_size)


class TokenReader(Reader):
    """Reads the rows of each source in the order of a seeded permutation per epoch; see `Reader`."""

    skipped_documents = 0  # prepare_data skipped them and counted them in the manifest

    def __init__(
        self,
        rows: Sequence[TokenRows],
        mixture: Mixture,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        start_sample: int,
    ) -> None:
        super().__init__(global_batch_size, micro_batch_size, dp_rank, dp_size, start_sample)
        self._rows = rows
        self._mixture = mixture
        self._seed = seed
        # (source, row) of the samples of later steps, int64 [num_micro_batches, micro_batch, 2] each
        self._located: deque[np.ndarray] = deque()
        self._next_located_sample = start_sample

    def cursor(self) -> np.ndarray:
        """int64 [1, 1]: number of global samples consumed.

        Raises:
            RuntimeError: micro-batches of the current step are left.
        """
        return np.array([[self.samples_consumed()]], dtype=np.int64)

    def _read(self, places: np.ndarray) -> np.ndarray:
        return read_places(self._rows, places)

    def _next_step(self) -> np.ndarray:
        num_steps = max(1, _SAMPLES_AHEAD * self._dp_size // self._global_batch_size)
        if len(self._located) < num_steps:
            first_samples = self._next_located_sample + self._global_batch_size * np.arange(num_steps)
            self._next_located_sample += self._global_batch_size * num_steps
            samples = np.stack([self._deal(first) for first in first_samples.tolist()])
            sources, indices = self._mixture.locate(samples)
            places = np.stack([sources, indices], axis=-1)
            for source, rows in enumerate(self._rows):
                own = sources == source
                places[own, 1] = locate_rows(indices[own], rows.num_rows, source_seed(self._seed, source))
                rows.will_read(places[own, 1])
            self._located.extend(places)
        return self._located.popleft()


def read_places(rows: Sequence[TokenRows], places: np.ndarray) -> np.ndarray:
    """Tokens at `places` (int64 [n, 2]: source, row) as int64 [n, seq_length + 1]."""
    if len(rows) == 1:
        return rows[0].read(places[:, 1])
    parts = [
        (own, rows[source].read(places[own, 1])) for source in range(len(rows)) if (own := places[:, 0] == source).any()
    ]
    tokens = np.empty((len(places), parts[0][1].shape[1]), dtype=np.int64)
    for own, part in parts:
        tokens[own] = part
    return tokens


class TokenData:
    """One or more sources of tokens, ready to be read; see `TrainingData`."""

    def __init__(self, sources: Sequence[TokenSource], mixture: Mixture, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer = tokenizer
        self._sources = sources
        self._mixture = mixture
        self._seed = seed

    cursor_shape = (1, 1)
    validation_is_costly = False

    def skipped_documents(self, cursor: np.ndarray) -> int:
        """As in `TrainingData`: the number that prepare_data skipped, for any `cursor`."""
        return sum(source.skipped_documents for source in self._sources)

    def describe(self) -> dict[str, Any]:
        """As in `TrainingData`."""
        parts = [
            {
                "num_shards": source.num_shards,
                "num_bytes": source.num_bytes,
                "num_train_tokens": source.train.num_tokens,
                "num_validation_tokens": source.validation.num_tokens,
                "samples_per_epoch": source.train.num_rows,
            }
            for source in self._sources
        ]
        first = self._sources[0]
        return {
            "kind": "tokens",
            **{key: sum(part[key] for part in parts) for key in parts[0]},
            "num_streams": 1,
            "validation_fraction": first.validation_fraction,
            "text_column": first.text_column,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "vocab_size": self.tokenizer.vocab_size,
            **describe_mixture(self._mixture, parts),
        }

    def train_reader(
        self,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        cursor: np.ndarray | None = None,
        start_sample: int = 0,
    ) -> Prefetched:
        """As in `TrainingData`; without a `cursor`, reading starts at global sample `start_sample`.

        Raises:
            ValueError: the sizes do not divide evenly, or the cursor is not one of token shards.
        """
        if cursor is not None:
            if cursor.shape != (1, 1) or cursor[0, 0] < 0:
                raise ValueError(
                    f"a cursor of token shards has the shape (1, 1) and is not negative, got {cursor.tolist()}"
                )
            start_sample = int(cursor[0, 0])
        sizes = (global_batch_size, micro_batch_size, dp_rank, dp_size)
        rows = [source.train for source in self._sources]
        return Prefetched(TokenReader(rows, self._mixture, self._seed, *sizes, start_sample))

    def validation_batches(self, num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[Batch]:
        """As in `TrainingData`. Every source contributes its share, in the order of training.

        Raises:
            UserError: the held-out documents fill fewer rows.
            ValueError: num_samples is not divisible by micro_batch_size * dp_size.
        """
        own = validation_samples(num_samples, micro_batch_size, dp_rank, dp_size)
        rows = [source.validation for source in self._sources]
        fraction = self._sources[0].validation_fraction
        num_rows = [part.num_rows for part in rows]
        check_held_out_rows(self._mixture, num_rows, num_samples, micro_batch_size * dp_size, fraction)
        places = np.stack(self._mixture.locate(own), axis=-1)
        return [batch_from_rows(read_places(rows, part)) for part in places]

    def validation_sources(
        self, num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> dict[str, np.ndarray]:
        """As in `TrainingData`."""
        return rows_of_sources(self._mixture, validation_samples(num_samples, micro_batch_size, dp_rank, dp_size))
