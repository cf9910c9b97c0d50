"""The storage of local files and of mounted file systems."""

from __future__ import annotations

import glob
import io
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megastruct.data.protocols import FileState
from megastruct.data.sources.shards import MANIFEST_NAME, TextShard
from megastruct.errors import Problem, UserError
from megastruct.paths import files_of_pattern

if TYPE_CHECKING:
    from megastruct.data.sources.find import Search


class LocalFiles:
    """A folder, which is searched recursively, a glob or a single file; see `Storage`."""

    request_bytes = io.DEFAULT_BUFFER_SIZE

    def find(self, search: Search) -> list[TextShard] | None:
        """As in `Storage`; relative paths are relative to the current directory."""
        local = Path(search.path).expanduser().absolute()
        if local.is_dir():
            if (local / MANIFEST_NAME).is_file():
                found = f"{local} holds token shards ({MANIFEST_NAME})"
                suggestion = "train with data.kind=tokens, or give the text that the token shards were made from"
                raise UserError(Problem(search.where, found, suggestion))
            files = [Path(folder) / name for folder, _, names in os.walk(local) for name in names]
            return _shards(search, files, local, f"the folder {local}", is_explicit=False)
        if local.is_file():
            return _shards(search, [local], local.parent, str(local))
        if glob.has_magic(search.path) and "://" not in search.path:
            files = files_of_pattern(str(local))
            root = os.path.commonpath([file.parent for file in files]) if files else local
            return _shards(search, files, Path(root), f"the pattern {local}")
        return None

    def open(self, shard: TextShard) -> io.RawIOBase:
        """As in `Storage`."""
        return open(shard.uri, "rb", buffering=0)

    def state(self, shard: TextShard) -> FileState:
        """As in `Storage`; the version is the modification time in nanoseconds."""
        status = os.stat(shard.uri)
        return FileState(status.st_size, str(status.st_mtime_ns))

    def commit_of(self, shard: TextShard) -> str | None:
        """As in `Storage`: always None."""
        return None

    def may_pass(self, shard: TextShard, error: Exception) -> bool:
        """As in `Storage`: errors of the operating system, but not a file that is missing from its folder."""
        if isinstance(error, FileNotFoundError):
            return not Path(shard.uri).parent.is_dir()  # a missing folder may be a mount that comes back
        # Arrow and gzip report damage as an OSError without errno; the system always sets errno.
        return isinstance(error, OSError) and bool(error.errno)

    def refusal(self, shard: TextShard, error: Exception) -> Problem | None:
        """As in `Storage`: always None."""
        return None


def _shards(search: Search, files: list[Path], root: Path, what: str, is_explicit: bool = True) -> list[TextShard]:
    names = [file.relative_to(root).as_posix() for file in files]
    names = search.text_names(names, what, partial(_read, root), is_explicit)
    return [TextShard(str(root / name), name, (root / name).stat().st_size) for name in names]


def _read(root: Path, name: str) -> bytes:
    """The contents of a dataset card; empty if it cannot be read, because a dataset need not have one."""
    try:
        return (root / name).read_bytes()
    except OSError:
        return b""
