"""The registry of storages, by the scheme of the addresses of their shards."""

from __future__ import annotations

from megastruct.data.protocols import Storage
from megastruct.data.sources.hub_files import HubFiles
from megastruct.data.sources.local_files import LocalFiles
from megastruct.data.sources.object_files import ObjectFiles
from megastruct.data.sources.shards import TextShard

# A path belongs to the first storage that accepts it.
STORAGES: dict[str, Storage] = {"": LocalFiles(), "hf": HubFiles()}
OTHER_ADDRESSES: Storage = ObjectFiles()  # for every scheme that is not registered


def storage_of(shard: TextShard) -> Storage:
    """The storage of a shard, by the scheme of its address."""
    return STORAGES.get(shard.scheme, OTHER_ADDRESSES)
