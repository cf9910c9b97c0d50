"""First floor: reads text or token shards and yields micro-batches in an order that depends on the seed alone.

`protocols.py` defines the interfaces for additions: storages, formats, tokenizers and kinds of data.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megastruct.data.batch import Batch
    from megastruct.data.open import open_data
    from megastruct.data.protocols import Tokenizer, TrainingData
    from megastruct.data.tokenizers.open import open_tokenizer

__all__ = ["Batch", "Tokenizer", "TrainingData", "open_data", "open_tokenizer"]

_HOMES = {
    "Batch": "batch",
    "Tokenizer": "protocols",
    "TrainingData": "protocols",
    "open_data": "open",
    "open_tokenizer": "tokenizers.open",
}


def __getattr__(name: str) -> object:
    """Import on first use, because tools and worker processes do without torch, which takes seconds to load."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
