"""The held-out documents of text shards, found by reading shards until there are enough."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megastruct.data.cache import cached_array, key_of
from megastruct.data.kept import tokenised
from megastruct.data.sources.reading import read_patiently
from megastruct.data.sources.shards import TextShard
from megastruct.data.split import is_validation
from megastruct.data.text.stream import TextSource


def held_out_tokens(source: TextSource, num_tokens: int, cache_folder: Path | None = None) -> np.ndarray:
    """The first `num_tokens` tokens of the held-out documents, int32 [num_tokens]; fewer if there are no more.

    Shards are read in the order of their names as far as needed, once for all ranks that share `cache_folder`.

    Raises:
        UserError: a shard is damaged or cannot be reached.
    """
    shards, fraction = _searched(source)
    states = [(shard.name, shard.num_bytes, shard.content_id) for shard in shards]
    columns = [shard.text_column for shard in shards]
    key = key_of(states, source.tokenizer.fingerprint, columns, fraction, num_tokens)
    return cached_array(cache_folder, f"held_out-{key}", lambda: _find(source, num_tokens))


def _find(source: TextSource, num_tokens: int) -> np.ndarray:
    parts: list[np.ndarray] = []
    shards, fraction = _searched(source)
    is_held_out = lambda document: is_validation(document.content, fraction)  # noqa: E731
    missing = num_tokens if fraction > 0 else 0
    for shard in shards:
        if missing <= 0:
            break
        for documents in read_patiently(shard, shard.text_column, patience_seconds=source.patience_seconds):
            found = [ids for _, ids in tokenised(source.tokenizer, documents, is_held_out)[0]]
            parts += found
            missing -= sum(map(len, found))
            if missing <= 0:
                break
    return np.concatenate([np.empty(0, np.int32), *parts])[:num_tokens]


def _searched(source: TextSource) -> tuple[Sequence[TextShard], float]:
    """The shards with held-out documents, and the share of their documents that is held out."""
    if source.held_out_shards:
        return source.held_out_shards, 1.0
    return source.shards, source.validation_fraction
