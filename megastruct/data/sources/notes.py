"""Words for what a place holds: lines about what is read, and what is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

_MOST_NAMED = 5


def not_read(kind: str, names: Sequence[str], noun: str = "file") -> list[str]:
    """The line about files of this kind, which are not read; none if there are no `names`."""
    return [f"not read, {kind}: {counted(len(names), noun)}{named(names)}"] if names else []


def is_hidden(name: str) -> bool:
    """Whether a file or its folder is hidden."""
    return any(part.startswith(".") for part in name.split("/"))


def counted(number: int, noun: str) -> str:
    """The number with the noun: 1 file, 2 files."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def named(names: Sequence[str]) -> str:
    """The first of some names in brackets, with a leading blank; with the number by ending if there are many."""
    if len(names) <= _MOST_NAMED:
        return f" ({', '.join(names)})" if names else ""
    endings = Counter(PurePosixPath(name).suffix or "without ending" for name in names)
    by_ending = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common(_MOST_NAMED))
    return f" ({by_ending}; the first: {', '.join(names[:_MOST_NAMED])})"
