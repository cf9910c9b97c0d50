"""Training data that is read from text shards during training (kind: text)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megastruct.data.batch import Batch, batch_from_rows
from megastruct.data.mixture import Mixture
from megastruct.data.protocols import Tokenizer
from megastruct.data.reader import check_held_out_rows, describe_mixture, rows_of_sources, validation_samples
from megastruct.data.text.held_out import held_out_tokens
from megastruct.data.text.reader import TextReader
from megastruct.data.text.stream import CURSOR_COLUMNS, TextSource


class TextData:
    """Text shards of one or more sources, checked and ready to be read; see `TrainingData`."""

    def __init__(
        self,
        sources: Sequence[TextSource],
        mixture: Mixture,
        seq_length: int,
        num_workers: int = 0,
        cache_folder: Path | None = None,
    ) -> None:
        """
        Args:
            sources: the sources, which share a tokenizer and a validation fraction.
            mixture: assigns the global samples to the sources.
            seq_length: tokens per sample, not counting the last label.
            num_workers: processes per reader that tokenise ahead; with 0, a thread of the reader's process does it.
            cache_folder: where the held-out tokens, which take long to find, are stored.
        """
        self._sources = sources
        self._mixture = mixture
        self._seq_length = seq_length
        self._num_workers = num_workers
        self._cache_folder = cache_folder
        self._held_out: dict[tuple[int, ...], list[np.ndarray]] = {}

    validation_is_costly = True

    @property
    def tokenizer(self) -> Tokenizer:
        """As in `TrainingData`."""
        return self._sources[0].tokenizer

    @property
    def cursor_shape(self) -> tuple[int, int]:
        """As in `TrainingData`: (streams of all sources, 5)."""
        return (sum(source.num_streams for source in self._sources), CURSOR_COLUMNS)

    @staticmethod
    def skipped_documents(cursor: np.ndarray) -> int:
        """As in `TrainingData`."""
        return int(cursor[:, -1].sum())

    def describe(self) -> dict[str, Any]:
        """As in `TrainingData`; numbers that are unknown before everything has been read are None."""
        first = self._sources[0]
        columns = sorted({column for source in self._sources for column in source.text_columns})
        parts = [
            {
                "num_shards": len(source.shards),
                "num_bytes": sum(shard.num_bytes for shard in source.shards),
                "num_streams": source.num_streams,
            }
            for source in self._sources
        ]
        return {
            "kind": "text",
            **{key: sum(part[key] for part in parts) for key in parts[0]},
            "num_train_tokens": None,
            "num_validation_tokens": None,
            "samples_per_epoch": None,
            "validation_fraction": first.validation_fraction,
            "text_column": columns[0] if len(columns) == 1 else columns,
            "tokenizer_fingerprint": first.tokenizer.fingerprint,
            "vocab_size": first.tokenizer.vocab_size,
            **describe_mixture(self._mixture, parts),
            **self._held_out_splits(),
            **self._hub_commits(),
        }

    def _held_out_splits(self) -> dict[str, list[int]]:
        """The bytes of the held-out split of every source, 0 if it has none; empty if no source has one."""
        num_bytes = [sum(shard.num_bytes for shard in source.held_out_shards) for source in self._sources]
        return {"held_out_bytes": num_bytes} if any(num_bytes) else {}

    def _hub_commits(self) -> dict[str, list[str | None]]:
        """The commit of every path of every source, None if it is not on the hub; empty if no path is on the hub."""
        commits = [commit for source in self._sources for commit in source.commits]
        return {"hub_commits": commits} if any(commits) else {}

    def train_reader(
        self,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        cursor: np.ndarray | None = None,
        start_sample: int = 0,
    ) -> TextReader:
        """As in `TrainingData`."""
        sizes = (global_batch_size, micro_batch_size, dp_rank, dp_size)
        return TextReader(
            self._sources, self._mixture, self._seq_length, *sizes, cursor, start_sample, self._num_workers
        )

    def validation_batches(self, num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[Batch]:
        """As in `TrainingData`. Every source contributes its share, in the order of training.

        Raises:
            UserError: the held-out documents fill fewer rows, or a shard cannot be read.
            ValueError: num_samples is not divisible by micro_batch_size * dp_size.
        """
        own = validation_samples(num_samples, micro_batch_size, dp_rank, dp_size)
        tokens = self._held_out_tokens(num_samples)
        num_rows = [max(0, len(part) - 1) // self._seq_length for part in tokens]
        fraction = self._sources[0].validation_fraction
        check_held_out_rows(self._mixture, num_rows, num_samples, micro_batch_size * dp_size, fraction)
        row = np.arange(self._seq_length + 1)
        batches = []
        for part in own:
            sources, indices = self._mixture.locate(part)
            places = zip(sources.tolist(), indices.tolist(), strict=True)
            rows = [tokens[source][index * self._seq_length + row] for source, index in places]
            batches.append(batch_from_rows(np.stack(rows).astype(np.int64)))
        return batches

    def validation_sources(
        self, num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> dict[str, np.ndarray]:
        """As in `TrainingData`."""
        return rows_of_sources(self._mixture, validation_samples(num_samples, micro_batch_size, dp_rank, dp_size))

    def _held_out_tokens(self, num_samples: int) -> list[np.ndarray]:
        """The held-out tokens that `num_samples` take of every source; fewer if a source has no more."""
        wanted = tuple(self._mixture.consumed(num_samples).tolist())
        if wanted not in self._held_out:
            self._held_out[wanted] = [
                held_out_tokens(source, count * self._seq_length + 1, self._cache_folder)
                for source, count in zip(self._sources, wanted, strict=True)
            ]
        return self._held_out[wanted]
