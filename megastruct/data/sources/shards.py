"""A text shard: one file of documents. A storage has its bytes, a format knows how documents are written in it."""

from __future__ import annotations

from dataclasses import dataclass

MANIFEST_NAME = "manifest.json"  # of token shards: the folder that holds it is none of text


@dataclass(frozen=True)
class TextShard:
    """One file of documents."""

    uri: str  # absolute path, or SCHEME://..., of the hub hf://datasets/ORG/NAME@COMMIT/...
    name: str  # the uri without what all shards of a source share; sorting by it does not depend on the location
    num_bytes: int
    content_id: str = ""  # a hash of the contents, where the storage knows it

    @property
    def scheme(self) -> str:
        """What names the storage; "" of local files."""
        return self.uri.partition("://")[0] if "://" in self.uri else ""

    @property
    def is_local(self) -> bool:
        return not self.scheme
