"""What was found by reading much of the data, kept in a folder of the run so that it is read once.

The ranks of a machine ask for it at the same time: one looks, the others wait for it. Without a folder, or where it
cannot be written, each looks itself. A value's name holds all that it depends on, so that no value is ever stale; what
a name on the hub stands for is kept as it was at the run's first start.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megastruct.files import FileLock, LocksNotSupportedError, NewFile

FOLDER_NAME = "data_cache"


def key_of(*parts: Any) -> str:
    """A short name for plain values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def cached_array(folder: Path | None, name: str, find: Callable[[], np.ndarray], parents: bool = False) -> np.ndarray:
    """The array `name` of the cache, or else what `find` returns, which is kept.

    The folder is made if the one above it exists, or `parents` may be made. What `find` raises is not kept.
    """
    with _locked(folder, parents) as usable:
        if folder is None or not usable:
            return find()
        path = folder / f"{name}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):  # missing, or damaged: found anew
            return np.load(path, allow_pickle=False)
        array = find()
        with contextlib.suppress(OSError), NewFile(path) as file:
            np.save(file, array, allow_pickle=False)
        return array


def cached_json(folder: Path | None, name: str, find: Callable[[], Any]) -> Any:
    """As `cached_array`, of plain values; the folders above are made, so that it is kept in any case."""
    array = cached_array(folder, name, lambda: np.frombuffer(json.dumps(find()).encode(), np.uint8), parents=True)
    return json.loads(array.tobytes())


@contextlib.contextmanager
def _locked(folder: Path | None, parents: bool) -> Iterator[bool]:
    """Whether the folder can be used; if so, no other process uses it meanwhile."""
    with contextlib.ExitStack() as stack:
        try:
            if folder is None:
                raise FileNotFoundError
            folder.mkdir(exist_ok=True, parents=parents)
            stack.enter_context(FileLock(folder / ".lock", "run.folder", wait=True))
        except (OSError, LocksNotSupportedError):
            usable = False
        else:
            usable = True
        yield usable
