"""All formats of text shards; which one a file has, its ending says."""

from __future__ import annotations

from megastruct.data.protocols import DocumentFormat
from megastruct.data.sources.json_lines import JsonLines
from megastruct.data.sources.parquet import Parquet
from megastruct.data.sources.shards import TextShard

# Of a folder with files of several formats, those of the first one are read.
FORMATS: list[DocumentFormat] = [Parquet(), JsonLines()]


def format_of(shard: TextShard) -> DocumentFormat:
    return next(file_format for file_format in FORMATS if shard.uri.endswith(file_format.endings))


def all_endings() -> list[str]:
    return [ending for file_format in FORMATS for ending in file_format.endings]
