"""Files that are compressed as a whole, recognised by the last ending of their names.

zstd is read by pyarrow, which is installed in any case; the other formats are in Python's library. Each of them reads
files of several frames or members, as parallel compressors write them, and reports a file that is cut short.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import BinaryIO

import pyarrow as pa

_BUFFER_BYTES = 1 << 20


def _open_zstd(file: BinaryIO) -> BinaryIO:
    return io.BufferedReader(pa.CompressedInputStream(file, "zstd"), _BUFFER_BYTES)


_OPENERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": gzip.open,  # type: ignore[dict-item]
    ".zst": _open_zstd,
    ".zstd": _open_zstd,
    ".bz2": bz2.open,  # type: ignore[dict-item]
    ".xz": lzma.open,  # type: ignore[dict-item]
}
DAMAGE = (zlib.error, lzma.LZMAError)  # what a damaged file raises other than OSError and EOFError


def with_compressed(*endings: str) -> tuple[str, ...]:
    """`endings`, and each of them followed by the ending of every compression."""
    return (*endings, *(ending + compression for compression in _OPENERS for ending in endings))


def decompressed(file: BinaryIO, name: str) -> BinaryIO:
    """A file that decompresses `file` if `name` ends like a compressed file, in any case; else `file` itself."""
    for ending, opener in _OPENERS.items():
        if name.lower().endswith(ending):
            return opener(file)
    return file
