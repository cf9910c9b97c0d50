"""The data room: text or token shards in, micro-batches out, in an order that depends on the seed alone.

`protocols.py` says what can be added (storages, formats, tokenizers, kinds of data) and what each must do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    """Import on first use: the tools and their worker processes need no torch, which takes seconds to load."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
