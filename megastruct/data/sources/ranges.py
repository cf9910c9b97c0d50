"""Files of a remote storage, read in byte ranges."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from typing import Any


class RangedBytes(io.RawIOBase, ABC):
    """A seekable file of known size. Every read is one request for exactly the bytes that it returns."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes, self._position = num_bytes, 0

    @abstractmethod
    def _read_range(self, start: int, num_bytes: int) -> bytes:
        """The `num_bytes` bytes from `start` on, all of them inside of the file."""

    def readable(self) -> bool:
        """Always true."""
        return True

    def seekable(self) -> bool:
        """Always true."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a byte, without a request; returns the new position."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        return self._position

    def tell(self) -> int:
        """The position of the next byte to read."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; returns the number of bytes read, which is 0 at the end of the file."""
        num_bytes = min(len(buffer), self._num_bytes - self._position)
        if num_bytes <= 0:
            return 0
        buffer[:num_bytes] = self._read_range(self._position, num_bytes)
        self._position += num_bytes
        return num_bytes
