"""Reading pieces of many token files: few of them open, what is needed soon asked for ahead.

Not by memory maps: a map keeps its file open, of which a process may have about a thousand; it reads a page at a time
when the page is touched, which a network file system answers one by one; and a file that is cut short under it kills
the process.
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
    """Open files of several `TokenFiles`; the one that was used longest ago is closed when there are too many.

    `most_open`: how many at most; None for what the limits of the process leave to all files together.
    """

    def __init__(self, most_open: int | None = None) -> None:
        self.lock = threading.RLock()  # held while a descriptor is in use; again by the collector in the same thread
        self.open: OrderedDict[tuple[int, int], int] = OrderedDict()  # (owner, file) -> descriptor, by last use
        self._most_open = most_open
        self._limit = most_open or _LEAST_OPEN
        self._num_files = self._num_owners = 0

    def add_owner(self, num_files: int) -> int:
        """The number of a new owner of so many files."""
        with self.lock:
            self._num_owners += 1
            self._num_files += num_files
            self._limit = self._most_open or _descriptors_for(self._num_files)
            return self._num_owners

    def remove_owner(self, owner: int, num_files: int) -> None:
        """Close all files of `owner`."""
        with self.lock:
            self._num_files -= num_files
            for key in [key for key in self.open if key[0] == owner]:
                os.close(self.open.pop(key))

    def get(self, owner: int, file: int, path: Path) -> int:
        """The descriptor of a file, good until the lock is released. Raises OSError if it cannot be opened."""
        descriptor = self.open.pop((owner, file), None)
        if descriptor is None:
            while len(self.open) >= self._limit:
                self._close_oldest()
            descriptor = self._open(path)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no neighbours of a row are wanted
        self.open[owner, file] = descriptor
        return descriptor

    def _open(self, path: Path) -> int:
        while True:
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:  # others in this process, or on this machine, need more than was left to them
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self.open:
                    raise
                self._close_oldest()

    def _close_oldest(self) -> None:
        os.close(self.open.popitem(last=False)[1])


_OF_THIS_PROCESS = Descriptors()


class TokenFiles:
    """Files of `dtype` tokens without a header, opened when they are first read.

    All of a process share its descriptors: a mixture has two of these for each of its sources.
    """

    def __init__(self, paths: Sequence[Path], dtype: np.dtype, descriptors: Descriptors = _OF_THIS_PROCESS) -> None:
        self._paths = paths
        self._dtype = dtype
        self._descriptors = descriptors
        self._owner = descriptors.add_owner(len(paths))
        weakref.finalize(self, descriptors.remove_owner, self._owner, len(paths))

    def read(self, file: int, offset: int, num_tokens: int) -> np.ndarray:
        """`num_tokens` tokens of `file` from token `offset` on, [num_tokens] of the files' dtype.

        Raises:
            UserError: the file cannot be read, or is shorter than it was.
        """
        size, start = num_tokens * self._dtype.itemsize, offset * self._dtype.itemsize
        try:
            with self._descriptors.lock:
                descriptor = self._descriptors.get(self._owner, file, self._paths[file])
                content = os.pread(descriptor, size, start)
                while content and len(content) < size:  # a signal, or a file system that answers in parts
                    more = os.pread(descriptor, size - len(content), start + len(content))
                    if not more:
                        break
                    content += more
        except OSError as error:
            raise UserError(Problem(str(self._paths[file]), f"cannot be read ({error.strerror})")) from None
        if len(content) < size:
            found = f"ends at byte {start + len(content)}: it was cut short since training began"
            raise UserError(
                Problem(str(self._paths[file]), found, "copy it again; the run goes on from its checkpoint")
            )
        return np.frombuffer(content, self._dtype)

    def will_read(self, file: int, offset: int, num_tokens: int) -> None:
        """Ask the system to fetch tokens that `read` will be asked for; returns at once, errors are left to `read`."""
        if not hasattr(os, "posix_fadvise"):
            return
        try:
            start, size = offset * self._dtype.itemsize, num_tokens * self._dtype.itemsize
            with self._descriptors.lock:
                descriptor = self._descriptors.get(self._owner, file, self._paths[file])
                os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_WILLNEED)
        except OSError:
            pass


def _descriptors_for(num_files: int) -> int:
    """How many of `num_files` files to hold open; asks for a higher limit of the process where that is allowed."""
    limit = allow_open_files(num_files + 2 * _SPARE_DESCRIPTORS)
    return max(_LEAST_OPEN, min(num_files, (limit - _SPARE_DESCRIPTORS) // 2))
