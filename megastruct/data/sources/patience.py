"""Retries with growing pauses, and the error when the time for them is over."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from megastruct.errors import Problem, UserError

DEFAULT_PATIENCE_SECONDS = 300.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0
T = TypeVar("T")


class Patience:
    """The pauses between the tries of one action, for `seconds` in all since its first failure; a success starts anew.

    Every failure prints a warning on stderr.
    """

    def __init__(self, uri: str, seconds: float, done: str = "read") -> None:
        """`uri`: what the action concerns, and `done`: a participle that says what is tried; both for messages."""
        self._uri, self._seconds, self._done = uri, seconds, done
        self.succeeded()

    def succeeded(self) -> None:
        """Start anew: the next failure counts as the first."""
        self._failing_since: float | None = None
        self._pause_seconds = _FIRST_PAUSE_SECONDS

    def next_pause(self, error: BaseException) -> float:
        """Seconds to sleep before the next try; respects the Retry-After of a server.

        Raises:
            UserError: the action has been failing for `seconds`.
        """
        self._failing_since = self._failing_since or time.monotonic()
        left_seconds = self._seconds - (time.monotonic() - self._failing_since)
        if left_seconds <= 0:
            raise unreachable(self._uri, self._seconds, f"last error: {reason(error)}", self._done) from None
        pause_seconds = min(max(self._pause_seconds, _wanted_pause(error)), left_seconds)
        self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
        line = f"warning: {self._uri}: {reason(error)}; trying again in {pause_seconds:.1f} s"
        print(line, file=sys.stderr, flush=True)
        return pause_seconds


def patiently(
    action: Callable[[], T], uri: str, seconds: float, may_pass: Callable[[Exception], bool], done: str = "read"
) -> T:
    """What `action` returns. It is retried for `seconds` while it fails with an error that `may_pass` accepts.

    Raises:
        UserError: `action` raised it, or has been failing for `seconds`.
        Exception: `action` failed with an error that `may_pass` does not accept.
    """
    patience = Patience(uri, seconds, done)
    while True:
        try:
            return action()
        except Exception as error:
            if isinstance(error, UserError) or not may_pass(error):
                raise
            pause_seconds = patience.next_pause(error)
        time.sleep(pause_seconds)


def unreachable(uri: str, seconds: float, why: str, done: str = "read") -> UserError:
    """The error for something that could not be read, or otherwise `done`, for `seconds`; `why` gives the reason."""
    found = f"could not be {done} for {seconds:g} s ({why})"
    suggestion = "check the network or the file system and start again, or raise data.patience_seconds"
    suggestion += " (--patience-seconds of tools/prepare_data.py)"
    return UserError(Problem(uri, found, suggestion))


def _wanted_pause(error: BaseException) -> float:
    """Seconds that a server asks to wait after too many requests (Retry-After), else 0."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    wanted = headers.get("Retry-After", "")
    return float(wanted) if wanted.isdecimal() else 0.0


def reason(error: BaseException) -> str:
    """The type and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
