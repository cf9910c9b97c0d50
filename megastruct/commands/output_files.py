"""Options of commands that name a file to be written: checked before anything is done, and written in the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megastruct.errors import Problem, UserError
from megastruct.files import write_atomically


def parent_problems(option: str, path: Path | None) -> Iterator[Problem]:
    """A problem if the folder in which `path` is to be made does not exist. None: the option was not given."""
    if path is not None and not path.absolute().parent.is_dir():
        yield Problem(option, f"there is no folder {path.absolute().parent}", "an existing folder")


def file_problems(option: str, path: Path | None, example: str) -> Iterator[Problem]:
    """What keeps the file `path` from being written; `example` is a name for it inside of a folder."""
    yield from parent_problems(option, path)
    if path is not None and path.is_dir():
        yield Problem(option, f"{path} is a folder", f"{option} {path / example}")


def write_json(option: str, path: Path, values: dict[str, Any]) -> None:
    """Write `values` to the file of `option`. Raises UserError if that fails."""
    try:
        write_atomically(path, json.dumps(values, indent=1))
    except OSError as error:
        raise UserError(Problem(option, f"{path}: {error.strerror}", "a file that you can write")) from None
