"""The time from a command to the end of a run's first step, by part."""

from __future__ import annotations

import time


class StartTimes:
    """Parts are measured one after another; the first begins with the command."""

    def __init__(self, seconds: float, part: str) -> None:
        """`seconds` have passed since the command began; they are those of `part`."""
        self.parts = [(part, seconds)]
        self._since = time.perf_counter()

    def done(self, part: str) -> None:
        """What has passed since the last call are the seconds of `part`."""
        now = time.perf_counter()
        self.parts.append((part, now - self._since))
        self._since = now

    def __str__(self) -> str:
        total = sum(seconds for _, seconds in self.parts)
        return f"after {total:.1f} s: " + ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.parts)
