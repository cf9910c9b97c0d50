"""Check shards before training, as far as a short look at each file allows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from megastruct.data.sources.errors import read_errors, unreadable
from megastruct.data.sources.formats import format_of
from megastruct.data.sources.patience import DEFAULT_PATIENCE_SECONDS, patiently
from megastruct.data.sources.shards import TextShard
from megastruct.data.sources.storages import storage_of
from megastruct.errors import Problem, UserError

_MAX_PROBLEMS_SHOWN = 20


def check_shards(shards: list[TextShard], text_column: str, patience_seconds: float = DEFAULT_PATIENCE_SECONDS) -> None:
    """Check that every local shard, and the first of the remote shards, can be opened and has the text column.

    Only the footer of a parquet file and the first lines of a JSONL file are read. Later damage is found when the
    shard is read.

    Raises:
        UserError: with every bad file (at most 20 are listed).
    """
    to_check = [shard for shard in shards if shard.is_local or not shard.num_bytes] or shards[:1]
    with ThreadPoolExecutor(16) as pool:  # there may be thousands of footers on a network file system
        found = pool.map(lambda shard: _check(shard, text_column, patience_seconds), to_check)
        problems = [problem for problem in found if problem]
    if problems:
        shown = problems[:_MAX_PROBLEMS_SHOWN]
        if len(problems) > len(shown):
            shown.append(Problem("", f"and {len(problems) - len(shown)} more files"))
        raise UserError(shown, f"{len(problems)} of {len(shards)} text shards cannot be used:")


def _check(shard: TextShard, text_column: str, patience_seconds: float) -> Problem | None:
    if shard.num_bytes == 0:
        return Problem(shard.uri, "the file is empty (0 bytes)", "remove it, or download it again")
    file_format, storage = format_of(shard), storage_of(shard)
    may_pass = lambda error: not shard.is_local and storage.may_pass(shard, error)  # noqa: E731
    try:
        return patiently(lambda: file_format.check(shard, text_column), shard.uri, patience_seconds, may_pass)
    except UserError as error:
        return error.problems[0]
    except read_errors(shard) as error:
        return unreadable(shard, error).problems[0]
