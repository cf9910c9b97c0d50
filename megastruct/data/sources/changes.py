"""Notice that a shard has been written again since it was found."""

from __future__ import annotations

from megastruct.data.protocols import FileState
from megastruct.data.sources.shards import TextShard
from megastruct.errors import Problem, UserError


def refuse_changed(shard: TextShard, state: FileState) -> None:
    """Raise UserError if `state` is not the one in which the shard was found.

    The version is compared where the storage tells it when it lists its files; the size always.
    """
    if state.num_bytes != shard.num_bytes:
        found = f"was changed: it has {state.num_bytes} bytes, but it had {shard.num_bytes} when this run began"
    elif shard.content_id and state.version and state.version != shard.content_id:
        found = f"was changed: it was written again since this run began (version {state.version})"
    else:
        return
    raise UserError(Problem(shard.uri, found, "wait until it is completely written, then start again"))
