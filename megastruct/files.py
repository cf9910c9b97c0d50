"""Files that are whole or absent, and locks between processes.

What a killed process was writing keeps a hidden name, `.NAME.writing`, which the next writer of NAME overwrites.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

_BUFFER_BYTES = 1 << 20
# What a file system says that cannot do what it is asked for; ENOLCK: NFS without its lock service.
_NOT_SUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


class NewFile:
    """A file that is written from its beginning to its end and has its name only when it is whole and on the disk.

    `finish` gives it the name, in place of a file that had it; `discard` drops it. As a context it is finished, or
    discarded after an error. One process writes a file of a given path at a time.
    OSErrors name `path`, also those of a full disk, which the system raises without a name.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._aside = path.with_name(f".{path.name}.writing")
        with self._errors_named():
            self._file = self._aside.open("wb", buffering=_BUFFER_BYTES)

    def write(self, content: bytes) -> int:
        """Append `content`; returns the number of its bytes."""
        with self._errors_named():
            return self._file.write(content)

    def finish(self) -> None:
        """Move the file to its place. Raises OSError if that fails, and then the file is discarded."""
        try:
            with self._errors_named():
                self._file.flush()
                os.fsync(self._file.fileno())  # the name must not reach the disk before the content
                self._file.close()
                os.replace(self._aside, self._path)
                sync_folder(self._path.parent)
        except OSError:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove what was written so far."""
        with contextlib.suppress(OSError):  # closing writes what is buffered, for which there may be no room
            self._file.close()
        with contextlib.suppress(OSError):
            self._aside.unlink()

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.finish()
        else:
            self.discard()

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = str(self._path)
            raise


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file, text as UTF-8, so that `path` has its old content or all of the new one, whenever the process is
    killed. Raises OSError, with `path` as its filename."""
    with NewFile(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` on the disk. Raises OSError; not where the file system cannot do it for folders."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)


class LockHeldError(Exception):
    """Another process has the lock."""


class FileLock:
    """A lock on the file `path`, which is made for it, from the constructor to `release` or the end of the process.

    It is advisory (flock). Two locks of one process meet as those of two processes do.
    On a file system without locks (some NFS, Lustre without its option `flock`) there is none: `warning` then says so.
    """

    def __init__(self, path: Path, *, shared: bool = False, wait: bool = False, temporary: bool = False) -> None:
        """`shared`: beside other shared ones, not beside one that is not.
        `wait`: until the lock is free.
        `temporary`: the file is removed by `release`; all who lock it must say so.

        Raises:
            LockHeldError: another process has it, and it is not waited for.
            OSError: the file cannot be made or locked.
        """
        self._path, self._temporary = path, temporary
        self.warning = ""
        flags = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        while True:
            self._file = path.open("a+b")  # NFS wants it readable for a shared lock, writable for the other
            try:
                self._lock(flags)
                if not temporary or self.warning or self._is_in_place():
                    return
            except BaseException:
                self._file.close()
                raise
            self._file.close()  # who had the lock removed the file, after it was opened here: there may be a new one

    def release(self) -> None:
        """Let others have the lock."""
        if self._temporary and not self._file.closed:
            self._path.unlink(missing_ok=True)
        self._file.close()

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _lock(self, flags: int) -> None:
        try:
            fcntl.flock(self._file, flags)
        except BlockingIOError:
            raise LockHeldError(str(self._path)) from None
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                error.filename = str(self._path)
                raise
            self.warning = (
                f"{self._path.parent} is on a file system without file locks ({error.strerror}): "
                "nothing keeps a second process from writing there"
            )

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False
