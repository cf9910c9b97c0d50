"""What reading a shard can raise that is the shard's fault, and how it is said."""

from __future__ import annotations

from megastruct.data.sources.formats import format_of
from megastruct.data.sources.shards import TextShard
from megastruct.data.sources.storages import storage_of
from megastruct.errors import Problem, UserError


def read_errors(shard: TextShard) -> tuple[type[Exception], ...]:
    """What a damaged or unreachable file can raise; anything else is a bug of ours and keeps its traceback."""
    return (OSError, EOFError, *format_of(shard).damage)


def unreadable(shard: TextShard, error: Exception) -> UserError:
    """The user's message for one of `read_errors`."""
    if refusal := storage_of(shard).refusal(shard, error):
        return UserError(refusal)
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    gone = isinstance(error, FileNotFoundError)
    found = "the file is gone" if gone else f"the file cannot be read, it is damaged or cut short ({text})"
    return UserError(Problem(shard.uri, found, "remove it, or download it again"))
