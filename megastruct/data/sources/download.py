"""Copy a file of a store to this machine: in ranges, each of which is retried, with its checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megastruct.data.sources.fsspec_address import StoreError, StoreRefusedError, store_errors
from megastruct.errors import Problem, UserError
from megastruct.files import NewFile

_RANGE_BYTES = 32 << 20  # of one request


def download(
    system: Any, source: str, num_bytes: int, path: Path, retried: Callable[[Callable[[], bytes]], bytes]
) -> str:
    """Write the file `path`, which appears when it is complete; returns the SHA-256 of its content in hex.

    `system`, `source`: file system of fsspec and the path in it. `retried`: calls its argument until it succeeds.

    Raises:
        UserError: `retried` gave up, or the file cannot be written.
    """
    sha256 = hashlib.sha256()

    def parts() -> Iterable[bytes]:
        for start in range(0, num_bytes, _RANGE_BYTES):
            end = min(start + _RANGE_BYTES, num_bytes)
            part = retried(lambda start=start, end=end: _range(system, source, start, end))  # type: ignore[misc]
            sha256.update(part)
            yield part

    write(path, parts())
    return sha256.hexdigest()


def write(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file, and the folders above it, from parts. Raises UserError if that is impossible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NewFile(path) as file:
            for part in parts:
                file.write(part)
    except (StoreError, StoreRefusedError):
        raise
    except OSError as error:
        found = f"cannot be written ({error.strerror or error})"
        raise UserError(Problem(str(path), found, "free some space, then run the same command again")) from None


def _range(system: Any, path: str, start: int, end: int) -> bytes:
    with store_errors():
        content = system.cat_file(path, start=start, end=end)
    if len(content) != end - start:
        raise StoreError(f"the store sent {len(content):,} of {end - start:,} requested bytes")
    return content
