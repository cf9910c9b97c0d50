"""Open text shards for training (kind: text)."""

from __future__ import annotations

from functools import partial
from itertools import zip_longest

import numpy as np

from megastruct.data.cache import cached_array, key_of
from megastruct.data.opening import check_vocab_size
from megastruct.data.options import DataOptions
from megastruct.data.order import default_num_streams, source_seed
from megastruct.data.protocols import Tokenizer
from megastruct.data.sources.check import check_shards
from megastruct.data.sources.find import find_shards
from megastruct.data.sources.shards import TextShard
from megastruct.data.text.data import TextData
from megastruct.data.text.stream import TextSource
from megastruct.data.tokenizers.open import open_tokenizer
from megastruct.errors import Problem, Problems, UserError


def open_text(options: DataOptions) -> TextData:
    """Find and check the shards of all sources, and their tokenizer.

    Raises:
        UserError: with everything that is missing, damaged or does not fit the config.
    """
    data, problems = options.data, Problems()
    tokenizer = problems.collect(lambda: _open_tokenizer(options))
    known = zip_longest(options.paths, options.hub_commits[: len(options.paths)])
    found = [problems.collect(partial(_open_shards, options, where, path, commit)) for (where, path), commit in known]
    problems.raise_if_any()
    assert tokenizer
    shards_of_sources = [shards for shards in found if shards is not None]
    sources = [
        TextSource(
            shards=shards,
            tokenizer=tokenizer,
            text_column=data.text_column,
            validation_fraction=data.validation_fraction,
            seed=source_seed(options.seed, index),
            num_streams=data.num_streams or default_num_streams(len(shards)),
            patience_seconds=data.patience_seconds,
        )
        for index, shards in enumerate(shards_of_sources)
    ]
    return TextData(sources, options.mixture, options.seq_length, data.num_workers, options.cache_folder)


def _open_tokenizer(options: DataOptions) -> Tokenizer:
    if options.tokenizer_path is None:
        suggestion = "give a SentencePiece model, such as one of tools/train_tokenizer.py, or a tokenizer.json"
        raise UserError(Problem("data.tokenizer", "is not set, but text shards need a tokenizer", suggestion))
    tokenizer = open_tokenizer(options.tokenizer_path, "data.tokenizer", options.tokenizer_options)
    check_vocab_size(tokenizer.vocab_size, options.vocab_size)
    return tokenizer


def _open_shards(options: DataOptions, where: str, path: str, commit: str | None) -> list[TextShard]:
    data = options.data
    shards = find_shards(path, where, data.patience_seconds, options.cache_folder, commit)
    key = key_of([(shard.uri, shard.num_bytes) for shard in shards], data.text_column)
    cached_array(options.cache_folder, f"checked-{key}", lambda: _checked(shards, options))
    if data.num_streams is not None and data.num_streams > len(shards):
        found = f"{data.num_streams} is more than the number of text shards, {len(shards)}"
        raise UserError(Problem("data.num_streams", found, f"set it to {len(shards)} or less, or leave it out"))
    return shards


def _checked(shards: list[TextShard], options: DataOptions) -> np.ndarray:
    """The number of shards, after all of them were checked; this may read thousands of footers."""
    check_shards(shards, options.data.text_column, options.data.patience_seconds)
    return np.array(len(shards))
