"""What a command prints: text that any terminal can show, and an output that may be closed or full.

A command that only prints ends when nobody reads it any more, as other programs do. A run goes on: its terminal may be
closed, and the disk of its log may be full, while it trains and saves.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from megastruct.errors import EXIT_CODE_USER_ERROR

_EXIT_CODE_PIPE_CLOSED = 141  # 128 + SIGPIPE, which other programs have in this case
_EXIT_CODE_INTERRUPTED = 130  # 128 + SIGINT
_CLOSED = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO}  # EIO: a terminal that is gone

Main = TypeVar("Main", bound=Callable[..., Any])


def command(main: Main) -> Main:
    """Decorates the `main` of a command that ends with its output.

    Exit codes: 141 if the reader of a pipe has gone, 2 with one message if stdout cannot be written (a full disk), 130
    after Ctrl-C. Characters that the terminal lacks are printed as escapes.
    """
    return _decorated(main, lasts=False)


def lasting_command(main: Main) -> Main:
    """Decorates a `main` that goes on without its output, which is then dropped."""
    return _decorated(main, lasts=True)


def _decorated(main: Main, lasts: bool) -> Main:
    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _streams(lasts):
            try:
                return main(*args, **kwargs)
            except KeyboardInterrupt:
                if lasts:
                    raise
                raise SystemExit(_EXIT_CODE_INTERRUPTED) from None

    return run  # type: ignore[return-value]


@contextmanager
def _streams(lasts: bool) -> Iterator[None]:
    """Replace stdout and stderr by streams over the same descriptors, and let stdin read any bytes."""
    before = sys.stdout, sys.stderr
    with suppress(AttributeError, ValueError, OSError):  # no stdin, or one that is no file
        if sys.stdin.encoding.lower() in ("ascii", "us-ascii", "ansi_x3.4-1968"):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    sys.stdout, sys.stderr = _stream(before[0], lasts), _stream(before[1], lasts=True)
    try:
        yield
        sys.stdout.flush()
    finally:
        ours, (sys.stdout, sys.stderr) = (sys.stdout, sys.stderr), before
        for stream in ours:
            with suppress(ValueError):  # a caller closed it
                stream.flush()


def _stream(stream: Any, lasts: bool) -> Any:
    """A stream of ours in place of `stream`; itself if it is no file (in a notebook or a test)."""
    if stream is None:  # closed by the caller: 2>&-
        return open(os.devnull, "w", encoding="utf-8")
    try:
        descriptor = stream.fileno()
        stream.flush()
        os.set_blocking(descriptor, True)  # a caller may share a descriptor that refuses when it is busy
    except (OSError, ValueError, AttributeError):
        return stream
    raw, unbuffered = _Output(descriptor, lasts), getattr(stream, "write_through", False)  # `python -u`
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=getattr(stream, "line_buffering", False) or os.isatty(descriptor),
        write_through=unbuffered,
    )


class _Output(io.RawIOBase):
    """Writes to a descriptor. When that fails for good, later writes go to the null device."""

    def __init__(self, descriptor: int, lasts: bool) -> None:
        self._descriptor, self._lasts = descriptor, lasts

    def fileno(self) -> int:
        return self._descriptor

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        """Raises SystemExit, which no handler of OSErrors on the way takes for an error of its own."""
        left = memoryview(data).cast("B")
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
            return len(data)
        except OSError as error:
            if error.errno in _CLOSED or not self._lasts:
                self._drop_the_rest()
            if self._lasts:
                return len(data)
            if error.errno in _CLOSED:
                raise SystemExit(_EXIT_CODE_PIPE_CLOSED) from None
            print(f"error: stdout cannot be written: {error.strerror}", file=sys.stderr, flush=True)
            raise SystemExit(EXIT_CODE_USER_ERROR) from None

    def _drop_the_rest(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError):
            os.dup2(null, self._descriptor)
        os.close(null)
