"""Errors that a user can fix, reported in one message: where the mistake is, what was found, and what would work.

A `UserError` carries any number of `Problem`s, so that all mistakes of a config are reported at once. Programs
catch it in their outermost function with `user_errors_exit`: the message goes to stderr, the exit code is 2, and
no traceback is shown. Every other exception is a bug in this project and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

EXIT_CODE_USER_ERROR = 2
EXIT_CODE_START_AGAIN = 75  # EX_TEMPFAIL: the run was asked to stop and has saved; the same command resumes it


@dataclass(frozen=True)
class Problem:
    """One mistake. `where` is the path of a config key or of a file; `suggestion` is something that would work."""

    where: str
    found: str
    suggestion: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.found}" if self.where else self.found
        return f"{text}\n    try: {self.suggestion}" if self.suggestion else text


class UserError(Exception):
    """Mistakes in the user's input (config, files, command line)."""

    def __init__(self, problems: Problem | Sequence[Problem], headline: str = "", on_all_ranks: bool = False) -> None:
        """`on_all_ranks`: all ranks raise the error together, so only rank 0 needs to print it."""
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        self.headline = headline
        self.on_all_ranks = on_all_ranks
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.headline] if self.headline else []
        return "\n".join(lines + [f"  {problem}" if self.headline else str(problem) for problem in self.problems])

    def __reduce__(self) -> tuple[Any, ...]:  # so that a worker process can pass it to its parent
        return (UserError, (self.problems, self.headline, self.on_all_ranks))


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
