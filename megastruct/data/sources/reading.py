"""Documents of a shard whose source may fail for a while: tried again, ever more slowly, then reported by name."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megastruct.data.sources import hub
from megastruct.data.sources.documents import Document, documents_or_error
from megastruct.data.sources.patience import DEFAULT_PATIENCE_SECONDS, Patience, reason
from megastruct.data.sources.shards import READ_ERRORS, TextShard, unreadable
from megastruct.errors import UserError


def read_patiently(
    shard: TextShard,
    text_column: str,
    start: int = 0,
    patience_seconds: float = DEFAULT_PATIENCE_SECONDS,
    watch: Callable[[str, str], None] | None = None,
) -> Iterator[list[Document]]:
    """Documents of `shard` from index `start` on, in lists of a few; only one column is read.

    A source that cannot be reached is tried again for `patience_seconds`. Reading goes on behind the last document
    that came, and each document that comes makes the patience whole again. Every failure is a line on stderr. `watch`
    gets the shard and what failed, at the start with an empty text.

    Raises:
        UserError: the file could not be reached for that long; or at once: it is damaged, cut short, lacks the
            column, has changed since it was found, or the hub refuses it.
    """
    if watch:
        watch(shard.uri, "")
    next_document = start
    patience = Patience(shard.uri, patience_seconds)
    while True:
        try:
            for documents in documents_or_error(shard, text_column, next_document):
                yield documents
                next_document = documents[-1].index + 1
                patience.succeeded()
            return
        except UserError:
            raise
        except Exception as error:  # the libraries below have no common class for what a network does
            if not may_pass(shard, error):
                if isinstance(error, READ_ERRORS):
                    raise unreadable(shard, error) from None
                raise
            pause_seconds = patience.next_pause(error)
            if watch:
                watch(shard.uri, reason(error))
        time.sleep(pause_seconds)


def may_pass(shard: TextShard, error: BaseException) -> bool:
    """Whether an error may be the network's or the file system's, and not the file's."""
    if not shard.is_local:
        return hub.of_the_network(error)
    if isinstance(error, FileNotFoundError):
        return not Path(shard.uri).parent.is_dir()  # with its folder it may be a mount that comes back
    # Arrow and gzip speak of damage by an OSError without a number; the system always gives one.
    return isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile) and bool(error.errno)
