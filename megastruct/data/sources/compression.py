"""Files that are compressed as a whole, which the last ending of their names says."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from typing import BinaryIO

_OPENERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {".gz": gzip.open}  # type: ignore[dict-item]
DAMAGE = (zlib.error,)  # what a damaged file raises beside OSError and EOFError


def with_compressed(*endings: str) -> tuple[str, ...]:
    """`endings`, and each followed by that of a compression."""
    return (*endings, *(ending + compression for compression in _OPENERS for ending in endings))


def decompressed(file: BinaryIO, name: str) -> BinaryIO:
    """`file` itself, or what reads it uncompressed."""
    for ending, opener in _OPENERS.items():
        if name.endswith(ending):
            return opener(file)
    return file
