"""The registry of formats of text shards. The ending of a file's name decides its format."""

from __future__ import annotations

from megastruct.data.protocols import DocumentFormat
from megastruct.data.sources.json_lines import JsonLines
from megastruct.data.sources.parquet import Parquet
from megastruct.data.sources.shards import TextShard

# If a folder has files of several formats, only the files of the first one are read.
FORMATS: list[DocumentFormat] = [Parquet(), JsonLines()]


def format_of(shard: TextShard) -> DocumentFormat:
    """The format of a shard, by the ending of its name."""
    return next(file_format for file_format in FORMATS if shard.uri.endswith(file_format.endings))


def all_endings() -> list[str]:
    """The endings of all formats, for example ".parquet"."""
    return [ending for file_format in FORMATS for ending in file_format.endings]
