"""Files that are compressed as a whole, recognised by the last ending of their names."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from typing import BinaryIO

_OPENERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {".gz": gzip.open}  # type: ignore[dict-item]
DAMAGE = (zlib.error,)  # what a damaged file raises other than OSError and EOFError


def with_compressed(*endings: str) -> tuple[str, ...]:
    """`endings`, and each of them followed by the ending of every compression."""
    return (*endings, *(ending + compression for compression in _OPENERS for ending in endings))


def decompressed(file: BinaryIO, name: str) -> BinaryIO:
    """A file that decompresses `file` if `name` ends like a compressed file; else `file` itself."""
    for ending, opener in _OPENERS.items():
        if name.endswith(ending):
            return opener(file)
    return file
