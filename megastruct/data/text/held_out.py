"""The held-out documents of text shards, found by reading shards until there are enough."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megastruct.data.cache import cached_array, key_of
from megastruct.data.sources.reading import read_patiently
from megastruct.data.split import is_validation
from megastruct.data.text.stream import TextSource


def held_out_tokens(source: TextSource, num_tokens: int, cache_folder: Path | None = None) -> np.ndarray:
    """The first `num_tokens` tokens of the held-out documents, int32 [num_tokens]; fewer if there are no more.

    Shards are read in the order of their names as far as needed, once for all ranks that share `cache_folder`.

    Raises:
        UserError: a shard is damaged or cannot be reached.
    """
    shards = [(shard.name, shard.num_bytes, shard.content_id) for shard in source.shards]
    key = key_of(shards, source.tokenizer.fingerprint, source.text_column, source.validation_fraction, num_tokens)
    return cached_array(cache_folder, f"held_out-{key}", lambda: _find(source, num_tokens))


def _find(source: TextSource, num_tokens: int) -> np.ndarray:
    parts: list[np.ndarray] = []
    missing = num_tokens if source.validation_fraction > 0 else 0
    for shard in source.shards:
        if missing <= 0:
            break
        for documents in read_patiently(shard, source.text_column, patience_seconds=source.patience_seconds):
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
    return np.concatenate([np.empty(0, np.int32), *parts])[:num_tokens]
