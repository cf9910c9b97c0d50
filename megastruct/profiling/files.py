"""The files of the folder `profile` in a run folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

FOLDER_NAME = "profile"


def write_file(path: Path, write: Callable[[Path], object], what: str) -> None:
    """Have `write` make a file under a hidden name, which then replaces `path`. A full disk is a warning.

    `what` is said on stderr together with the path; empty: nothing is.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        print(f"\nwarning: {path} was not written: {error.strerror or error}", file=sys.stderr, flush=True)
        return
    if what:
        print(f"\n{what}: {path}", file=sys.stderr, flush=True)
