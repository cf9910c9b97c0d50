"""Open text shards for training (kind: text)."""

from __future__ import annotations

from functools import partial

import numpy as np

from megastruct.data.cache import cached_array, key_of
from megastruct.data.opening import check_vocab_size
from megastruct.data.options import DataOptions
from megastruct.data.order import default_num_streams, source_seed
from megastruct.data.protocols import Tokenizer
from megastruct.data.sources.check import check_shards
from megastruct.data.sources.place import Corpus, find_corpus
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
    found = [problems.collect(partial(open_corpus, options, index)) for index in range(len(data.places))]
    problems.raise_if_any()
    assert tokenizer
    sources = [
        TextSource(
            shards=corpus.shards,
            tokenizer=tokenizer,
            validation_fraction=0.0 if corpus.held_out else data.validation_fraction,
            seed=source_seed(options.seed, index),
            num_streams=data.num_streams or default_num_streams(len(corpus.shards)),
            patience_seconds=data.patience_seconds,
            held_out_shards=corpus.held_out_shards,
            commits=tuple(text.commit for text in corpus.train),
        )
        for index, corpus in enumerate(corpus for corpus in found if corpus is not None)
    ]
    return TextData(sources, options.mixture, options.seq_length, data.num_workers, options.cache_folder)


def open_corpus(options: DataOptions, index: int) -> Corpus:
    """Find and check the shards of source `index`, and report what is read.

    Raises:
        UserError: with everything that is missing or damaged.
    """
    data = options.data
    corpus = find_corpus(
        options.places(index), data.places[index].validation_split, data.patience_seconds, options.cache_folder
    )
    shards = [*corpus.shards, *corpus.held_out_shards]
    key = key_of([(shard.uri, shard.num_bytes, shard.text_column) for shard in shards])
    cached_array(options.cache_folder, f"checked-{key}", lambda: _checked(shards, data.patience_seconds))
    if data.num_streams is not None and data.num_streams > len(corpus.shards):
        found = f"{data.num_streams} is more than the number of text shards, {len(corpus.shards)}"
        suggestion = f"set it to {len(corpus.shards)} or less, or leave it out"
        raise UserError(Problem("data.num_streams", found, suggestion))
    for line in corpus.lines():
        options.report(line)
    return corpus


def _open_tokenizer(options: DataOptions) -> Tokenizer:
    if options.tokenizer_path is None:
        suggestion = "give a SentencePiece model, such as one of tools/train_tokenizer.py, or a tokenizer.json"
        raise UserError(Problem("data.tokenizer", "is not set, but text shards need a tokenizer", suggestion))
    tokenizer = open_tokenizer(options.tokenizer_path, "data.tokenizer", options.tokenizer_options)
    check_vocab_size(tokenizer.vocab_size, options.vocab_size)
    return tokenizer


def _checked(shards: list[TextShard], patience_seconds: float) -> np.ndarray:
    """The number of shards, after all of them were checked; this may read thousands of footers."""
    check_shards(shards, patience_seconds)
    return np.array(len(shards))
