"""From what a user gives as the place of text to a sorted list of shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megastruct.data.sources.formats import FORMATS, all_endings
from megastruct.data.sources.patience import DEFAULT_PATIENCE_SECONDS
from megastruct.data.sources.shards import TextShard
from megastruct.data.sources.storages import STORAGES
from megastruct.errors import Problem, UserError


@dataclass(frozen=True)
class Search:
    """What a storage needs to know to find shards."""

    path: str  # as the user wrote it
    where: str  # its key or option, for messages
    patience_seconds: float
    cache_folder: Path | None  # keeps what a name stood for when it was first used
    commit: str | None  # that the name stands for where the cache has none

    def text_names(self, names: list[str], what: str) -> list[str]:
        """Those of `names` that are text shards, sorted: all of the first format in the registry that has any.

        JSON lines are taken only where there is no parquet file: beside parquet they are notes about it.

        Raises:
            UserError: there is none; `what` says where they were looked for.
        """
        for file_format in FORMATS:
            if chosen := [name for name in names if name.endswith(file_format.endings)]:
                return sorted(chosen)
        found = f"{what} has no text shard among its {len(names)} files"
        raise UserError(Problem(self.where, found, f"give files that end with {', '.join(all_endings())}"))


def find_shards(
    path: str,
    where: str,
    patience_seconds: float = DEFAULT_PATIENCE_SECONDS,
    cache_folder: Path | None = None,
    commit: str | None = None,
) -> list[TextShard]:
    """All shards that `path` stands for, sorted by name: of a folder, a glob, a file or a Hugging Face dataset name.

    Relative paths start at the current directory; a local path comes before a name of the hub. What a dataset name
    stood for is kept in `cache_folder`; where it is not there any more, `commit` says which one a run began with.

    Raises:
        UserError: nothing is there, no file has a known ending, or the hub cannot be reached; `where` is its key.
    """
    search = Search(path, where, patience_seconds, cache_folder, commit)
    for storage in STORAGES.values():
        shards = storage.find(search)
        if shards is not None:
            return shards
    found = f"{Path(path).expanduser().absolute()} does not exist"
    raise UserError(Problem(where, found, "give a folder, a glob or a file of text shards"))
