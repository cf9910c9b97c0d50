"""Paths as users write them, in a config, an option or an override: the one place that reads them.

`~`, `~name`, `$NAME` and `${NAME}` stand for what they do in a shell, which leaves them alone behind `=` and in quotes.
Everything else is taken as it is.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
from pathlib import Path

from megastruct.errors import Problem, UserError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def expanded(text: str) -> str:
    """`text` with its home folder and variables. Raises ValueError if one of them does not exist."""
    for match in _VARIABLE.finditer(text):
        name = match[1] or match[2]
        if name not in os.environ:
            raise ValueError(f"the variable ${name} is not set")
    path = os.path.expanduser(_VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], text))
    if path.startswith("~"):
        raise ValueError(f"there is no home folder {path.split('/')[0]}")
    return path


def expanded_at(text: str, where: str) -> str:
    """`expanded` of the text of the key or option `where`. Raises UserError."""
    try:
        return expanded(text)
    except ValueError as error:
        raise UserError(Problem(where, f"{text!r}: {error}", "set it, or write the path out")) from None


def user_cache() -> Path:
    """The folder for what may be lost, but costs time to make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megastruct"


def option_path(text: str) -> Path:
    """The type of an option that is a path; argparse prints what is wrong with it."""
    return Path(option_text(text))


def option_text(text: str) -> str:
    """The type of an option that is a path, a pattern or a name."""
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def paths_of_pattern(pattern: str) -> list[Path]:
    """The files and folders that a glob names, as absolute paths. Folders of it that exist are names, whatever
    characters they have; so is the current folder, which a relative pattern starts from."""
    path = Path(pattern).absolute()
    prefix = next(parent for parent in path.parents if parent.is_dir())
    found = glob.glob(str(path.relative_to(prefix)), root_dir=prefix, recursive=True)
    return [prefix / name for name in found]
