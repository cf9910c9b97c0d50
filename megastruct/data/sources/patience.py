"""Waiting between tries of what fails for a while: ever longer, and named when patience is at its end."""

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
    """Waits between the tries of one thing, `seconds` in all from a first failure to the last; a success starts anew.

    Every failure is a line on stderr.
    """

    def __init__(self, uri: str, seconds: float, wanted: str = "document") -> None:
        self._uri, self._seconds, self._wanted = uri, seconds, wanted
        self.succeeded()

    def succeeded(self) -> None:
        self._failing_since: float | None = None
        self._pause_seconds = _FIRST_PAUSE_SECONDS

    def next_pause(self, error: BaseException) -> float:
        """How long to sleep before the next try.

        Raises:
            UserError: patience is at its end.
        """
        self._failing_since = self._failing_since or time.monotonic()
        left_seconds = self._seconds - (time.monotonic() - self._failing_since)
        if left_seconds <= 0:
            raise unreachable(self._uri, self._seconds, reason(error), self._wanted) from None
        pause_seconds = min(max(self._pause_seconds, _wanted_pause(error)), left_seconds)
        self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
        line = f"warning: {self._uri}: {reason(error)}; trying again in {pause_seconds:.1f} s"
        print(line, file=sys.stderr, flush=True)
        return pause_seconds


def patiently(
    action: Callable[[], T], uri: str, seconds: float, may_pass: Callable[[Exception], bool], wanted: str = "document"
) -> T:
    """What `action` returns, which is called again for `seconds` while it fails with what `may_pass`."""
    patience = Patience(uri, seconds, wanted)
    while True:
        try:
            return action()
        except Exception as error:
            if isinstance(error, UserError) or not may_pass(error):
                raise
            pause_seconds = patience.next_pause(error)
        time.sleep(pause_seconds)


def unreachable(uri: str, seconds: float, why: str, wanted: str = "document") -> UserError:
    """The user's message when patience is at its end."""
    found = f"gave no {wanted} for {seconds:g} s ({why})"
    suggestion = "check the network or the file system, then start again; or raise data.patience_seconds"
    suggestion += " (--patience-seconds of tools/prepare_data.py)"
    return UserError(Problem(uri, found, suggestion))


def _wanted_pause(error: BaseException) -> float:
    """Seconds that a server which is asked too often wants to be left alone (Retry-After), else 0."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    wanted = headers.get("Retry-After", "")
    return float(wanted) if wanted.isdecimal() else 0.0


def reason(error: BaseException) -> str:
    """One line that says what failed."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
