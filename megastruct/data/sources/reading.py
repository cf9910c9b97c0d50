"""Documents of a shard whose storage may fail for a while: tried again, ever more slowly, then reported by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from megastruct.data.sources.documents import Document
from megastruct.data.sources.errors import read_errors, unreadable
from megastruct.data.sources.formats import format_of
from megastruct.data.sources.patience import DEFAULT_PATIENCE_SECONDS, Patience, reason
from megastruct.data.sources.shards import TextShard
from megastruct.data.sources.storages import storage_of
from megastruct.errors import Problem, UserError


def read_patiently(
    shard: TextShard,
    text_column: str,
    start: int = 0,
    patience_seconds: float = DEFAULT_PATIENCE_SECONDS,
    watch: Callable[[str, str], None] | None = None,
) -> Iterator[list[Document]]:
    """Documents of `shard` from index `start` on, in lists of a few; only one column is read.

    A storage that cannot be reached is tried again for `patience_seconds`. Reading goes on behind the last document
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
            check_unchanged(shard)
            for documents in format_of(shard).documents(shard, text_column, next_document):
                yield documents
                next_document = documents[-1].index + 1
                patience.succeeded()
            return
        except UserError:
            raise
        except Exception as error:  # the libraries below have no common class for what a network does
            if not storage_of(shard).may_pass(shard, error):
                if isinstance(error, read_errors(shard)):
                    raise unreadable(shard, error) from None
                raise
            pause_seconds = patience.next_pause(error)
            if watch:
                watch(shard.uri, reason(error))
        time.sleep(pause_seconds)


def num_documents(shard: TextShard) -> int | None:
    """Documents in a local shard, broken ones too; None where only reading it would tell."""
    if not shard.is_local:
        return None
    try:
        return format_of(shard).num_documents(shard)
    except read_errors(shard):
        return None  # whoever reads it says what is wrong


def check_unchanged(shard: TextShard) -> None:
    """Raises UserError if the shard has another size than when it was found, OSError if it is gone."""
    num_bytes = storage_of(shard).state(shard).num_bytes
    if num_bytes != shard.num_bytes:
        found = f"has {num_bytes} bytes, it had {shard.num_bytes} when this run began: it was changed meanwhile"
        raise UserError(Problem(shard.uri, found, "let it be written to its end, then start again"))
