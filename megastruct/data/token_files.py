"""Reading pieces of many token files: few of them open, what is needed soon asked for ahead.

Not by memory maps: a map keeps its file open, of which a process may have about a thousand; it reads a page at a time
when the page is touched, which a network file system answers one by one; and a file that is cut short under it kills
the process.
"""

from __future__ import annotations

import os
import resource
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megastruct.errors import Problem, UserError

_SPARE_DESCRIPTORS = 512  # for sockets, libraries, checkpoints
_LEAST_OPEN = 32


class TokenFiles:
    """Files of `dtype` tokens without a header, opened when they are first read."""

    def __init__(self, paths: Sequence[Path], dtype: np.dtype, most_open: int | None = None) -> None:
        self._paths = paths
        self._dtype = dtype
        self._most_open = most_open or _descriptors_for(len(paths))
        self._open: dict[int, int] = {}  # file -> descriptor, the one that was used last at the end
        weakref.finalize(self, _close_all, self._open)

    def read(self, file: int, offset: int, num_tokens: int) -> np.ndarray:
        """`num_tokens` tokens of `file` from token `offset` on, [num_tokens] of the files' dtype.

        Raises:
            UserError: the file cannot be read, or is shorter than it was.
        """
        size, start = num_tokens * self._dtype.itemsize, offset * self._dtype.itemsize
        try:
            content = os.pread(self._descriptor(file), size, start)
            while content and len(content) < size:  # a signal, or a file system that answers in parts
                more = os.pread(self._descriptor(file), size - len(content), start + len(content))
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
            os.posix_fadvise(self._descriptor(file), start, size, os.POSIX_FADV_WILLNEED)
        except OSError:
            pass

    def _descriptor(self, file: int) -> int:
        descriptor = self._open.pop(file, None)
        if descriptor is None:
            while len(self._open) >= self._most_open:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = os.open(self._paths[file], os.O_RDONLY | os.O_CLOEXEC)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no neighbours of a row are wanted
        self._open[file] = descriptor
        return descriptor


def _descriptors_for(num_files: int) -> int:
    """How many files to hold open; asks for a higher limit of the process where that is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return max(1, num_files)
    wanted = num_files + 2 * _SPARE_DESCRIPTORS
    if soft < wanted:
        soft_wanted = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft_wanted, hard))
            soft = soft_wanted
        except (OSError, ValueError):
            pass
    return max(_LEAST_OPEN, min(num_files, (soft - _SPARE_DESCRIPTORS) // 2))


def _close_all(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
