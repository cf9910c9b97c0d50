"""The storage of local files and of mounted file systems."""

from __future__ import annotations

import glob
import io
import os
import stat
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megastruct.data.protocols import FileState
from megastruct.data.sources.notes import not_read
from megastruct.data.sources.shards import MANIFEST_NAME, TextShard
from megastruct.errors import Problem, Problems, UserError
from megastruct.paths import paths_of_pattern

if TYPE_CHECKING:
    from megastruct.data.sources.find import Search


class LocalFiles:
    """A folder, which is searched recursively, a glob or a single file; see `Storage`.

    Links to folders are followed.
    """

    request_bytes = io.DEFAULT_BUFFER_SIZE

    def find(self, search: Search) -> list[TextShard] | None:
        """As in `Storage`; relative paths are relative to the current directory."""
        local = Path(search.path).expanduser().absolute()
        if local.is_dir():
            if (local / MANIFEST_NAME).is_file():
                found = f"{local} holds token shards ({MANIFEST_NAME})"
                suggestion = "train with data.kind=tokens, or give the text that the token shards were made from"
                raise UserError(Problem(search.where, found, suggestion))
            files, again = _files_below(local, search.where)
            shards = _shards(search, files, local, f"the folder {local}", is_explicit=False)
            search.notes.extend(not_read("to a folder that is read already", _names(again, local), "link"))
            return shards
        if os.path.lexists(local):
            return _shards(search, [local], local.parent, str(local))
        if glob.has_magic(search.path) and "://" not in search.path:
            paths, again = _once(paths_of_pattern(str(local)))
            files = [path for path in paths if not path.is_dir()]
            search.folders_of_pattern(list(map(str, set(paths) - set(files))), list(map(str, files)))
            root = Path(os.path.commonpath([file.parent for file in files])) if files else local
            shards = _shards(search, files, root, f"the pattern {local}")
            search.notes.extend(not_read("read already by a shorter path", _names(again, root)))
            return shards
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


def _files_below(folder: Path, where: str) -> tuple[list[Path], list[Path]]:
    """(all that is no folder, links to folders that are reached already), each below `folder`.

    Links are followed after everything else, so that a folder has the name that it has without them.

    Raises:
        UserError: a folder cannot be listed.
    """
    files, again, links, seen = list[Path](), list[Path](), [folder], set[tuple[int, int]]()
    while links:
        folders = [links.pop(0)]
        while folders:
            current = folders.pop()
            status = os.stat(current)
            if (status.st_dev, status.st_ino) in seen:
                again.append(current)
                continue
            seen.add((status.st_dev, status.st_ino))
            try:
                entries = sorted(os.scandir(current), key=lambda entry: entry.name)
            except OSError as error:
                found = f"the folder {current} cannot be listed ({error.strerror})"
                raise UserError(Problem(where, found, "make it readable, or give the folders beside it")) from None
            for entry in entries:
                known = files if not entry.is_dir() else links if entry.is_symlink() else folders
                known.append(current / entry.name)
    return files, again


def _once(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """Those of `paths` that lie in different folders or have different names, and the others: `**` follows links."""
    real = {folder: os.path.realpath(folder) for folder in {path.parent for path in paths}}
    first: dict[tuple[str, str], Path] = {}
    for path in sorted(paths, key=lambda path: (len(path.parts), path)):
        first.setdefault((real[path.parent], path.name), path)
    once = set(first.values())
    return [path for path in paths if path in once], [path for path in paths if path not in once]


def _names(paths: list[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def _shards(search: Search, files: list[Path], root: Path, what: str, is_explicit: bool = True) -> list[TextShard]:
    names = search.text_names(_names(files, root), what, partial(_read, root), is_explicit)
    problems, shards = Problems(), list[TextShard]()
    for name in names:
        try:
            status = os.stat(root / name)
        except OSError as error:
            is_link = isinstance(error, FileNotFoundError) and os.path.islink(root / name)
            found = f"a link to {os.readlink(root / name)}, which does not exist" if is_link else str(error.strerror)
            problems.append(Problem(str(root / name), found, "restore the file, or remove it"))
            continue
        if not stat.S_ISREG(status.st_mode):  # a pipe, which could be read only once, or a device
            problems.append(Problem(str(root / name), "is no plain file", "write what it yields to a file"))
        shards.append(TextShard(str(root / name), name, status.st_size))
    problems.raise_if_any()
    return shards


def _read(root: Path, name: str) -> bytes:
    """The contents of a dataset card; empty if it cannot be read, because a dataset need not have one."""
    try:
        return (root / name).read_bytes()
    except OSError:
        return b""
