"""Detects damage: `checksums.json` holds the size and SHA-256 of every file of a checkpoint.

The checksums are computed while the files are written, so no file is read again for them. When a checkpoint is chosen
for loading, its files are divided among the ranks, and each file is checked by one of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from typing_extensions import override

MANIFEST_FILE = "checksums.json"


@dataclass(frozen=True)
class Checksum:
    """The size of a file in bytes, and its SHA-256 in hexadecimal digits."""

    num_bytes: int
    sha256: str


class ChecksumWriter(dcp.FileSystemWriter):
    """DCP's writer, with one file per rank, synced to the disk.

    `write_data` raises OSError if a file cannot be written; torch's zip writer would hide it.
    """

    def __init__(self, folder: Path) -> None:
        # No copying ahead: the tensors are in host memory already, and the thread must not use a GPU.
        super().__init__(folder, single_file_per_rank=True, sync_files=True, per_thread_copy_ahead=0)
        self.fs: _ChecksumFileSystem = _ChecksumFileSystem()

    @property
    def checksums(self) -> dict[str, Checksum]:
        """The checksums of the files that this rank has written, by file name."""
        return self.fs.checksums

    @override
    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except Exception:
            if self.fs.error is not None:
                raise self.fs.error from None
            raise


class _ChecksumFileSystem(FileSystem):
    def __init__(self) -> None:
        self.checksums: dict[str, Checksum] = {}
        self.error: OSError | None = None  # of a write

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with Path(path).open(mode) as file:
            stream = _ChecksumStream(file, self)
            yield stream
        self.checksums[Path(path).name] = Checksum(stream.num_bytes, stream.sha256.hexdigest())

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.checksums[Path(new_path).name] = self.checksums.pop(Path(path).name)


class _ChecksumStream:
    """A file that is written sequentially."""

    def __init__(self, file: Any, file_system: _ChecksumFileSystem) -> None:
        self.file, self.file_system, self.num_bytes, self.sha256 = file, file_system, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.file_system.error = error
            raise
        self.sha256.update(data)
        self.num_bytes += memoryview(data).nbytes
        return memoryview(data).nbytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def manifest_text(checksums: dict[str, Checksum]) -> str:
    """The text of `checksums.json`."""
    return json.dumps({name: asdict(checksums[name]) for name in sorted(checksums)}, indent=1)


def read_manifest(folder: Path) -> dict[str, Checksum]:
    """The checksums of a checkpoint's files, by name. Raises OSError or ValueError if they cannot be read."""
    return parse_manifest((folder / MANIFEST_FILE).read_text(encoding="utf-8"))


def parse_manifest(text: str) -> dict[str, Checksum]:
    """The checksums in the text of a `checksums.json`, by name of the file. Raises ValueError for anything else."""
    values = json.loads(text)
    try:
        return {name: Checksum(int(value["num_bytes"]), str(value["sha256"])) for name, value in values.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{error!r} in {MANIFEST_FILE}") from None


def size_problem(path: Path, wanted: Checksum) -> str:
    """A description of what is wrong with the size of a file; empty if it is right."""
    try:
        found = path.stat().st_size
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return "" if found == wanted.num_bytes else f"{path.name} has {found} bytes instead of {wanted.num_bytes}"


def content_problem(path: Path, wanted: Checksum) -> str:
    """A description of what is wrong with a file, which is read for this; empty if it is undamaged."""
    problem = size_problem(path, wanted)
    if problem:
        return problem
    try:
        found = checksum_of(path)
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return "" if found == wanted else f"{path.name} has changed since it was written (another checksum)"


def checksum_of(path: Path) -> Checksum:
    """The checksum of the file as it is now. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Checksum(file.tell(), sha256)
