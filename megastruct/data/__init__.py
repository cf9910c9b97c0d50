"""The data room: text or token shards in, micro-batches out, in an order that depends on the seed alone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megastruct.data.batch import Batch
    from megastruct.data.open import open_data
    from megastruct.data.tokenizer import Tokenizer

__all__ = ["Batch", "Tokenizer", "open_data"]

_HOMES = {"Batch": "batch", "open_data": "open", "Tokenizer": "tokenizer"}


def __getattr__(name: str):
    """Import on first use: the tools and their worker processes need no torch, which takes seconds to load."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
