"""Errors that a user can fix, reported in one message: where the mistake is, what was found, and what would work.

All refusals are `MegastructError`s. A `UserError` carries any number of `Problem`s, so that all mistakes of a config
are reported at once. Programs catch it in their outermost function with `user_errors_exit`: the message goes to stderr,
the exit code is 2, and no traceback is shown. Every other exception is a bug in this project and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

EXIT_CODE_USER_ERROR = 2
EXIT_CODE_START_AGAIN = 75  # EX_TEMPFAIL: the run was asked to stop and has saved; the same command resumes it


@dataclass(frozen=True)
class Problem:
    """One mistake. `where` is the path of a config key or of a file; `suggestion` is something that works.

    `parts`: the mistakes that `found` sums up, shown below it. `places`: where the values at fault were set, each a
    file with a line, or an override.
    """

    where: str
    found: str
    suggestion: str = ""
    parts: tuple[Problem, ...] = ()
    places: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text()

    def text(self, depth: int = 0) -> str:
        """`depth`: how many headlines stand above it."""
        lines = ["  " * depth + (f"{self.where}: {self.found}" if self.where else self.found)]
        lines += ["  " * max(depth + 1, 2) + f"at: {place}" for place in self.places]
        if self.suggestion:
            lines.append("  " * max(depth + 1, 2) + f"try: {self.suggestion}")
        return "\n".join([*lines, *(part.text(depth + 1) for part in self.parts)])


class MegastructError(Exception):
    """The root of the exceptions by which this package refuses what it is given."""


class SizeError(MegastructError, ValueError):
    """Sizes of a layer that do not fit its widths; the message has the nearest that do."""


class UserError(MegastructError):
    """Mistakes in the user's input (config, files, command line)."""

    def __init__(self, problems: Problem | Sequence[Problem], headline: str = "", on_all_ranks: bool = False) -> None:
        """`on_all_ranks`: all ranks raise the error together, so only rank 0 needs to print it."""
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        self.headline = headline
        self.on_all_ranks = on_all_ranks
        super().__init__(str(self))

    def __str__(self) -> str:
        headlines = [self.headline] if self.headline else []
        return "\n".join([*headlines, *(problem.text(len(headlines)) for problem in self.problems)])

    def __reduce__(self) -> tuple[Any, ...]:  # so that a worker process can pass it to its parent
        return (UserError, (self.problems, self.headline, self.on_all_ranks))


class Problems(list[Problem]):
    """Problems that are gathered, so that all are reported at once."""

    def collect(self, function: Callable[[], T]) -> T | None:
        """What `function` returns; None if it raises a UserError, which is taken in."""
        try:
            return function()
        except UserError as error:
            self.take(error)
            return None

    def take(self, error: UserError) -> None:
        """Add the problems of `error`, below its headline if it has one. What is here already is not repeated."""
        problems = [Problem("", error.headline, parts=error.problems)] if error.headline else error.problems
        self += [problem for problem in problems if problem not in self]

    def raise_if_any(self) -> None:
        """Raises UserError with all of them, if there are any."""
        if self:
            raise UserError(self)


@contextmanager
def user_errors_exit(print_message: bool = True, rank: int = 0) -> Iterator[None]:
    """Turn a `UserError` into one message on stderr and exit code 2.

    `print_message` is False on all ranks but one. Of errors that all ranks raise together, only `rank` 0 prints one.
    Raises SystemExit.
    """
    try:
        yield
    except UserError as error:
        if print_message and not (error.on_all_ranks and rank):
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_CODE_USER_ERROR) from None
