"""Read the documents of a shard, with retries if its storage fails for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from megastruct.data.protocols import FileState
from megastruct.data.sources.changes import refuse_changed
from megastruct.data.sources.documents import Document
from megastruct.data.sources.errors import read_errors, unreadable
from megastruct.data.sources.formats import format_of
from megastruct.data.sources.patience import DEFAULT_PATIENCE_SECONDS, Patience, patiently, reason
from megastruct.data.sources.shards import TextShard
from megastruct.data.sources.storages import storage_of
from megastruct.errors import UserError


def read_patiently(
    shard: TextShard,
    text_column: str,
    start: int = 0,
    patience_seconds: float = DEFAULT_PATIENCE_SECONDS,
    watch: Callable[[str, str], None] | None = None,
) -> Iterator[list[Document]]:
    """Documents of `shard` from index `start` on, in lists of a few; only the column `text_column` is read.

    A storage that cannot be reached is retried for `patience_seconds`. Reading continues after the last document that
    arrived, and every document that arrives starts the time anew. Every failure prints a warning on stderr. `watch` is
    called with the address of the shard and the error; at the start, the error is an empty string.

    Raises:
        UserError: the file could not be reached for that long. Or, without a retry: it is damaged, cut short, has no
            such column, has changed since it was found, or access to it is denied.
    """
    if watch:
        watch(shard.uri, "")
    next_document = start
    patience = Patience(shard.uri, patience_seconds)
    while True:
        try:
            check_unchanged(shard)
            for documents in format_of(shard).documents(shard, text_column, next_document):
                yield documents
                next_document = documents[-1].index + 1
                patience.succeeded()
            return
        except UserError:
            raise
        except Exception as error:  # the libraries have no common class for network errors
            if not storage_of(shard).may_pass(shard, error):
                if isinstance(error, read_errors(shard)):
                    raise unreadable(shard, error, begun=True) from None
                raise
            pause_seconds = patience.next_pause(error)
            if watch:
                watch(shard.uri, reason(error))
        time.sleep(pause_seconds)


def num_documents(shard: TextShard) -> int | None:
    """Number of documents in a local shard, including broken ones; None if counting needs all of the file."""
    if not shard.is_local:
        return None
    try:
        return format_of(shard).num_documents(shard)
    except read_errors(shard):
        return None  # reading the shard will report the problem


def check_unchanged(shard: TextShard) -> None:
    """Check that the shard is still as it was found: its size and, where the storage knows it, its version.

    Raises:
        UserError: it differs.
        OSError: the file is gone or cannot be reached.
    """
    refuse_changed(shard, storage_of(shard).state(shard))


def current_state(shard: TextShard, patience_seconds: float) -> FileState:
    """The state of the shard's file now. A remote storage that fails is retried.

    Raises:
        UserError: the storage could not be reached for that long, or refuses access.
        OSError: the file is gone, or is local and cannot be reached.
    """
    storage = storage_of(shard)
    may_pass = lambda error: not shard.is_local and storage.may_pass(shard, error)  # noqa: E731
    try:
        return patiently(lambda: storage.state(shard), shard.uri, patience_seconds, may_pass)
    except Exception as error:
        if refusal := storage.refusal(shard, error):
            raise UserError(refusal) from None
        raise
