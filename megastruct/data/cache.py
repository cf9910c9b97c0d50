"""A cache in the run folder for results that take much reading to find.

The ranks of a machine ask for a result at the same time: one rank computes it while the others wait. Without a folder,
or if the folder cannot be written, every rank computes it. The name of an entry contains a hash of everything that the
result depends on, so no entry is ever stale. The commit of a hub dataset is the exception: it stays as it was when the
run first started.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megastruct.files import FileLock, NewFile

FOLDER_NAME = "data_cache"


def key_of(*parts: Any) -> str:
    """A hash of plain values (whatever JSON can express) as 24 hex digits, for the name of an entry."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def cached_array(folder: Path | None, name: str, find: Callable[[], np.ndarray], parents: bool = False) -> np.ndarray:
    """The array `name` of the cache; if it is missing, what `find` returns, which is then stored.

    `folder` is created if its parent exists, or together with its parents if `parents` is true. Errors of `find` are
    passed on and not stored.
    """
    with _locked(folder, parents) as usable:
        if folder is None or not usable:
            return find()
        path = folder / f"{name}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):  # missing or damaged: computed again
            return np.load(path, allow_pickle=False)
        array = find()
        with contextlib.suppress(OSError), NewFile(path) as file:
            np.save(file, array, allow_pickle=False)
        return array


def cached_json(folder: Path | None, name: str, find: Callable[[], Any]) -> Any:
    """Like `cached_array`, for plain values. Missing parent folders are created, so that the value is always stored."""
    array = cached_array(folder, name, lambda: np.frombuffer(json.dumps(find()).encode(), np.uint8), parents=True)
    return json.loads(array.tobytes())


@contextlib.contextmanager
def _locked(folder: Path | None, parents: bool) -> Iterator[bool]:
    """Yield whether the folder can be used; if so, no other process uses it at the same time."""
    with contextlib.ExitStack() as stack:
        try:
            if folder is None:
                raise FileNotFoundError
            folder.mkdir(exist_ok=True, parents=parents)
            lock = stack.enter_context(FileLock(folder / ".lock", wait=True))
        except OSError:
            usable = False
        else:
            usable = not lock.warning
        yield usable
