"""Documents of a shard whose source may fail for a while: tried again, ever more slowly, then reported by name."""

from __future__ import annotations

import gzip
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from megastruct.data.documents import Document, documents_or_error
from megastruct.data.source import READ_ERRORS, TextShard, unreadable
from megastruct.errors import Problem, UserError

DEFAULT_PATIENCE_SECONDS = 300.0
_MISTAKES = (ImportError, AttributeError, NameError, TypeError, AssertionError, MemoryError)  # of ours, or of a set-up
_FINAL_STATUSES = (401, 403, 404)  # of HTTP: no access, or nothing there
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0


def read_patiently(
    shard: TextShard,
    text_column: str,
    start: int = 0,
    patience_seconds: float = DEFAULT_PATIENCE_SECONDS,
    watch: Callable[[str, str], None] | None = None,
) -> Iterator[list[Document]]:
    """As `read_documents`; a source that cannot be reached is tried again for `patience_seconds`.

    It goes on behind the last document that came, and each document that comes makes the patience whole again.
    Every failure is a line on stderr. `watch` gets the shard and what failed, at the start with an empty text.

    Raises:
        UserError: the file is damaged (at once), or could not be reached for that long.
    """
    if watch:
        watch(shard.uri, "")
    next_document = start
    failing_since: float | None = None
    pause_seconds = _FIRST_PAUSE_SECONDS
    while True:
        try:
            for documents in documents_or_error(shard, text_column, next_document):
                yield documents
                next_document = documents[-1].index + 1
                failing_since, pause_seconds = None, _FIRST_PAUSE_SECONDS
            return
        except UserError:
            raise
        except Exception as error:  # the libraries below have no common class for what a network does
            if not may_pass(shard, error):
                if not shard.is_local and _is_refused(error):
                    raise _no_access(shard, error) from None
                if isinstance(error, READ_ERRORS):
                    raise unreadable(shard, error) from None
                raise
            failing_since = failing_since or time.monotonic()
            left_seconds = patience_seconds - (time.monotonic() - failing_since)
            if left_seconds <= 0:
                raise unreachable(shard.uri, patience_seconds, _reason(error)) from None
            pause_seconds = min(pause_seconds, left_seconds)
            line = f"warning: {shard.uri}: {_reason(error)}; trying again in {pause_seconds:.1f} s"
            print(line, file=sys.stderr, flush=True)
            if watch:
                watch(shard.uri, _reason(error))
        time.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)


def may_pass(shard: TextShard, error: BaseException) -> bool:
    """Whether an error may be the network's or the file system's, and not the file's."""
    if not shard.is_local:
        final = (*_MISTAKES, pa.ArrowInvalid, FileNotFoundError)
        return not isinstance(error, final) and not _is_refused(error)
    if isinstance(error, FileNotFoundError):
        return not Path(shard.uri).parent.is_dir()  # with its folder it may be a mount that comes back
    # Arrow and gzip speak of damage by an OSError without a number; the system always gives one.
    return isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile) and bool(error.errno)


def unreachable(uri: str, patience_seconds: float, reason: str) -> UserError:
    """The user's message when patience is at its end."""
    found = f"gave no document for {patience_seconds:g} s ({reason})"
    suggestion = "check the network or the file system, then start again; or raise data.patience_seconds"
    return UserError(Problem(uri, found, suggestion))


def _is_refused(error: BaseException) -> bool:
    """Whether a remote source answered, and the answer was no."""
    # httpx and requests carry the response, aiohttp the status itself.
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    return isinstance(error, PermissionError) or status in _FINAL_STATUSES


def _no_access(shard: TextShard, error: BaseException) -> UserError:
    suggestion = "check its name, log in (hf auth login) and ask for access if it is gated; or download it"
    return UserError(Problem(shard.uri, f"cannot be read: the source refuses it ({_reason(error)})", suggestion))


def _reason(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
