"""Further data to validate on during training: token shards or text, of which the first rows are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megastruct.data.batch import Batch, batch_from_rows
from megastruct.data.cache import cached_array, key_of
from megastruct.data.kept import tokenised
from megastruct.data.options import DataOptions
from megastruct.data.protocols import Tokenizer
from megastruct.data.reader import validation_samples
from megastruct.data.sources.check import TEXT_COLUMNS, check_shards
from megastruct.data.sources.place import Place
from megastruct.data.sources.reading import read_patiently
from megastruct.data.sources.shards import TextShard
from megastruct.data.tokens.data import shard_rows
from megastruct.data.tokens.manifest import MANIFEST_NAME, check_files, load_manifest
from megastruct.data.tokens.rows import TokenRows
from megastruct.errors import Problem, UserError


class ValidationSource:
    """The first `num_samples` rows of a folder of token shards (its held-out part, if it has one) or of a text.

    Rows overlap by one token, as in training.
    """

    def __init__(self, options: DataOptions, tokenizer: Tokenizer, name: str, path: str, num_samples: int) -> None:
        """`options`, `tokenizer`: the run's. `num_samples`: rows that `batches` will ask for.

        Raises:
            UserError: there is no such data, it is damaged, made with another tokenizer, or has fewer rows.
        """
        self._options, self._tokenizer, self._num_samples = options, tokenizer, num_samples
        self._where = f"evaluation.sources.{name}"
        folder = Path(path).expanduser().absolute()
        self._rows = self._open(folder) if (folder / MANIFEST_NAME).is_file() else self._read_text(path)
        num_rows = self._rows.num_rows if isinstance(self._rows, TokenRows) else len(self._rows)
        if num_rows < num_samples:
            found = f"evaluation.num_samples is {num_samples}, but {path} fills only {num_rows} rows"
            suggestion = f"evaluation.num_samples={num_rows} or less, or more text"
            raise UserError(Problem(self._where, found, suggestion if num_rows else "more text"))

    def batches(self, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[Batch]:
        """The share of rank `dp_rank` in the rows, dealt as in training."""
        own = validation_samples(self._num_samples, micro_batch_size, dp_rank, dp_size)
        read = self._rows.read if isinstance(self._rows, TokenRows) else self._rows.__getitem__
        return [batch_from_rows(read(rows).astype(np.int64)) for rows in own]

    def _open(self, folder: Path) -> TokenRows:
        manifest = load_manifest(folder)
        check_files(folder, manifest)
        theirs = manifest.settings.tokenizer
        if theirs.fingerprint != self._tokenizer.fingerprint:
            found = f"{folder} was made with another tokenizer (sha256 {theirs.fingerprint[:12]}...) than the run's"
            suggestion = f"the text instead, or tokens of it made with --tokenizer {self._tokenizer.path}"
            raise UserError(Problem(self._where, found, suggestion))
        split = "validation" if manifest.splits.validation else "train"
        return shard_rows(folder, manifest, split, self._options.seq_length, self._options.vocab_size)

    def _read_text(self, path: str) -> np.ndarray:
        """The rows of a text, int32 [rows, seq_length + 1]; found once for all ranks that share the cache."""
        options, length = self._options, self._options.seq_length
        patience = options.data.patience_seconds
        chosen = options.data.text_column
        place = Place(path, self._where, text_columns=(chosen, *TEXT_COLUMNS) if chosen else TEXT_COLUMNS)
        found = place.find(patience, options.cache_folder)
        shards, column = found.shards, found.text_column
        check_shards(shards, patience)
        num_tokens = self._num_samples * length + 1
        states = [(shard.uri, shard.num_bytes, shard.content_id) for shard in shards]
        key = key_of(states, self._tokenizer.fingerprint, column, num_tokens)
        tokens = cached_array(options.cache_folder, f"validation-{key}", lambda: self._tokens(shards, num_tokens))
        num_rows = max(0, len(tokens) - 1) // length
        return tokens[np.arange(num_rows)[:, None] * length + np.arange(length + 1)]

    def _tokens(self, shards: list[TextShard], num_tokens: int) -> np.ndarray:
        parts: list[np.ndarray] = []
        missing, data = num_tokens, self._options.data
        for shard in shards:
            for documents in read_patiently(shard, shard.text_column, patience_seconds=data.patience_seconds):
                found = [ids for _, ids in tokenised(self._tokenizer, documents)[0]]
                parts += found
                missing -= sum(map(len, found))
                if missing <= 0:
                    return np.concatenate(parts)[:num_tokens]
        return np.concatenate([np.empty(0, np.int32), *parts])
