"""The registry of formats of text shards. The ending of a file's name, in any case, decides its format."""

from __future__ import annotations

from megastruct.data.protocols import DocumentFormat
from megastruct.data.sources.arrow import Arrow
from megastruct.data.sources.json_lines import JsonLines
from megastruct.data.sources.parquet import Parquet
from megastruct.data.sources.plain_text import PlainText
from megastruct.data.sources.shards import TextShard

FORMATS: list[DocumentFormat] = [Parquet(), Arrow(), JsonLines(), PlainText()]


def format_of_name(name: str) -> DocumentFormat | None:
    """The format of a file with this name or address; None if no format has its ending."""
    lower = name.lower()
    return next((file_format for file_format in FORMATS if lower.endswith(file_format.endings)), None)


def format_of(shard: TextShard) -> DocumentFormat:
    """The format of a shard, by the ending of its name."""
    file_format = format_of_name(shard.uri)
    assert file_format, f"{shard.uri} was found as a shard, but no format has its ending"
    return file_format


def all_endings() -> list[str]:
    """The endings of all formats, for example ".parquet"."""
    return [ending for file_format in FORMATS for ending in file_format.endings]
