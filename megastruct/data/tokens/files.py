"""Read pieces of many token files with few open files, and prefetch what will be needed soon.

Memory maps are not used, for three reasons. A map keeps its file open, and a process may have only about a thousand
open files. A map reads one page at a time when it is touched, which is slow on a network file system. And if a mapped
file is truncated, the process is killed.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megastruct.errors import Problem, UserError
from megastruct.processes import allow_open_files

_SPARE_DESCRIPTORS = 512  # for sockets, libraries, checkpoints
_LEAST_OPEN = 32


class Descriptors:
    """The open files of several `TokenFiles`. If there are too many, the least recently used one is closed.

    `most_open`: largest number of open files; None uses what the limit of the process allows.
    """

    def __init__(self, most_open: int | None = None) -> None:
        self.lock = (
            threading.RLock()
        )  # held while a descriptor is in use; the garbage collector may take it again in the same thread
        self.open: OrderedDict[tuple[int, int], int] = (
            OrderedDict()
        )  # (owner, file) -> descriptor, least recently used first
        self._most_open = most_open
        self._limit = most_open or _LEAST_OPEN
        self._num_files = self._num_owners = 0

    def add_owner(self, num_files: int) -> int:
        """Register an owner of `num_files` files; returns its number."""
        with self.lock:
            self._num_owners += 1
            self._num_files += num_files
            self._limit = self._most_open or _descriptors_for(self._num_files)
            return self._num_owners

    def remove_owner(self, owner: int, num_files: int) -> None:
        """Close all files of `owner`, which had `num_files`."""
        with self.lock:
            self._num_files -= num_files
            for key in [key for key in self.open if key[0] == owner]:
                os.close(self.open.pop(key))

    def get(self, owner: int, file: int, path: Path) -> int:
        """The descriptor of a file, valid while the caller holds `lock`.

        Raises:
            OSError: the file cannot be opened.
        """
        descriptor = self.open.pop((owner, file), None)
        if descriptor is None:
            while len(self.open) >= self._limit:
                self._close_oldest()
            descriptor = self._open(path)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead around a row
        self.open[owner, file] = descriptor
        return descriptor

    def _open(self, path: Path) -> int:
        while True:
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:  # other code needs more descriptors than were left for it
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self.open:
                    raise
                self._close_oldest()

    def _close_oldest(self) -> None:
        os.close(self.open.popitem(last=False)[1])


_OF_THIS_PROCESS = Descriptors()


class TokenFiles:
    """Files of tokens without a header, opened when they are first read. `dtype`: of all files, or of each.

    By default all objects of a process share its descriptors, because a mixture has two objects for each source.
    """

    def __init__(
        self, paths: Sequence[Path], dtype: np.dtype | Sequence[np.dtype], descriptors: Descriptors = _OF_THIS_PROCESS
    ) -> None:
        self._paths = paths
        self._dtypes = [dtype] * len(paths) if isinstance(dtype, np.dtype) else dtype
        self._descriptors = descriptors
        self._owner = descriptors.add_owner(len(paths))
        weakref.finalize(self, descriptors.remove_owner, self._owner, len(paths))

    def read(self, file: int, offset: int, num_tokens: int) -> np.ndarray:
        """`num_tokens` tokens of `file` from token `offset` on, [num_tokens] of the file's dtype.

        Raises:
            UserError: the file cannot be read, or has become shorter.
        """
        itemsize = self._dtypes[file].itemsize
        size, start = num_tokens * itemsize, offset * itemsize
        try:
            with self._descriptors.lock:
                descriptor = self._descriptors.get(self._owner, file, self._paths[file])
                content = os.pread(descriptor, size, start)
                while content and len(content) < size:  # a signal, or a file system that returns less than requested
                    more = os.pread(descriptor, size - len(content), start + len(content))
                    if not more:
                        break
                    content += more
        except OSError as error:
            raise UserError(Problem(str(self._paths[file]), f"cannot be read ({error.strerror})")) from None
        if len(content) < size:
            found = f"ends at byte {start + len(content)}; it was cut short after training began"
            raise UserError(
                Problem(
                    str(self._paths[file]), found, "copy it again, then start again to resume from the last checkpoint"
                )
            )
        return np.frombuffer(content, self._dtypes[file])

    def will_read(self, file: int, offset: int, num_tokens: int) -> None:
        """Ask the system to prefetch tokens for a later `read`. Returns immediately; errors are left to `read`."""
        if not hasattr(os, "posix_fadvise"):
            return
        try:
            itemsize = self._dtypes[file].itemsize
            start, size = offset * itemsize, num_tokens * itemsize
            with self._descriptors.lock:
                descriptor = self._descriptors.get(self._owner, file, self._paths[file])
                os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_WILLNEED)
        except OSError:
            pass


def _descriptors_for(num_files: int) -> int:
    """How many of `num_files` files to hold open; asks for a higher limit of the process where that is allowed."""
    limit = allow_open_files(num_files + 2 * _SPARE_DESCRIPTORS)
    return max(_LEAST_OPEN, min(num_files, (limit - _SPARE_DESCRIPTORS) // 2))
