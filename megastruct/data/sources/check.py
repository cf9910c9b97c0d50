"""Check shards before training, as far as a short look at each file allows."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from megastruct.data.sources.errors import REMOVE_IT, read_errors, unreadable
from megastruct.data.sources.formats import format_of
from megastruct.data.sources.patience import DEFAULT_PATIENCE_SECONDS, patiently
from megastruct.data.sources.shards import TextShard
from megastruct.data.sources.storages import storage_of
from megastruct.errors import Problem, UserError

TEXT_COLUMNS = ("content", "text")  # of RefinedWeb; of most other corpora
_MAX_PROBLEMS_SHOWN = 20
_MAX_SEARCHED = 16


def check_shards(shards: Sequence[TextShard], patience_seconds: float = DEFAULT_PATIENCE_SECONDS) -> None:
    """Check that every local shard, and the first of the remote shards, can be opened and has its text column.

    Only the footer of a parquet file and the first lines of a JSONL file are read. Later damage is found when the
    shard is read.

    Raises:
        UserError: with every bad file (at most 20 are listed).
    """
    to_check = [shard for shard in shards if shard.is_local or not shard.num_bytes] or shards[:1]
    with ThreadPoolExecutor(16) as pool:  # there may be thousands of footers on a network file system
        found = pool.map(lambda shard: problem_of(shard, shard.text_column, patience_seconds), to_check)
        problems = [problem for problem in found if problem]
    if problems:
        shown = problems[:_MAX_PROBLEMS_SHOWN]
        if len(problems) > len(shown):
            shown.append(Problem("", f"and {len(problems) - len(shown)} more files"))
        raise UserError(shown, f"{len(problems)} of {len(shards)} text shards cannot be used:")


def choose_text_column(
    shards: Sequence[TextShard], names: Sequence[str] = TEXT_COLUMNS, patience_seconds: float = DEFAULT_PATIENCE_SECONDS
) -> str:
    """The first of the columns `names` that is in one of the shards, as far as a look at some of them tells.

    If none of them is there, or a shard cannot be read, `check_shards` reports it.
    """
    found = set()
    for shard in [shard for shard in shards if shard.num_bytes][: _MAX_SEARCHED if len(names) > 1 else 0]:
        own = [name for name in names if problem_of(shard, name, patience_seconds) is None]
        if len(own) < len(names):  # without columns, as in plain text, none is missing
            found.update(own[:1])
        if names[0] in found or (found and not shard.is_local):
            break
    return next((name for name in names if name in found), names[0])


def problem_of(shard: TextShard, text_column: str, patience_seconds: float) -> Problem | None:
    """Why a shard cannot be used, as far as a short look at it shows; None if nothing is wrong."""
    if shard.num_bytes == 0:
        return Problem(shard.uri, "the file is empty (0 bytes)", REMOVE_IT)
    file_format, storage = format_of(shard), storage_of(shard)
    may_pass = lambda error: not shard.is_local and storage.may_pass(shard, error)  # noqa: E731
    try:
        return patiently(lambda: file_format.check(shard, text_column), shard.uri, patience_seconds, may_pass)
    except UserError as error:
        return error.problems[0]
    except read_errors(shard) as error:
        return unreadable(shard, error).problems[0]
