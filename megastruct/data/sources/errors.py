"""Errors of reading that are the fault of the shard, and their messages."""

from __future__ import annotations

from megastruct.data.sources.formats import format_of
from megastruct.data.sources.shards import TextShard
from megastruct.data.sources.storages import storage_of
from megastruct.errors import Problem, UserError

REMOVE_IT = "remove it, or download it again"


def read_errors(shard: TextShard) -> tuple[type[Exception], ...]:
    """Exceptions that a damaged or unreachable file can raise. Any other exception is a bug and keeps its traceback."""
    return (OSError, EOFError, *format_of(shard).damage)


def unreadable(shard: TextShard, error: Exception, begun: bool = False) -> UserError:
    """The error to raise for one of `read_errors`: refused access, a missing file, or a damaged one.

    `begun`: whether something has been made of the shards already. It keeps their list, so none can be left out.
    """
    if refusal := storage_of(shard).refusal(shard, error):
        return UserError(refusal)
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    gone = isinstance(error, FileNotFoundError)
    found = "the file is gone" if gone else f"the file cannot be read; it is damaged or cut short ({text})"
    suggestion = "download it again, and repeat the command; or begin anew without it" if begun else REMOVE_IT
    return UserError(Problem(shard.uri, found, suggestion))
