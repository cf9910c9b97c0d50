"""A text shard is one file of documents. A storage provides its bytes, and a format parses its documents."""

from __future__ import annotations

from dataclasses import dataclass

MANIFEST_NAME = "manifest.json"  # of token shards; a folder that has it is not a folder of text shards


@dataclass(frozen=True)
class TextShard:
    """One file of documents."""

    uri: str  # absolute path, or SCHEME://...; on the hub hf://datasets/ORG/NAME@COMMIT/...
    name: str  # the uri relative to its source, so that sorting by name does not depend on the location
    num_bytes: int
    content_id: str = ""  # a hash of the contents if the storage knows it
    text_column: str = ""  # the column that holds the text; empty as long as it was not looked for

    @property
    def scheme(self) -> str:
        """The scheme of the storage; "" for local files."""
        return self.uri.partition("://")[0] if "://" in self.uri else ""

    @property
    def is_local(self) -> bool:
        """Whether `uri` is a path."""
        return not self.scheme
