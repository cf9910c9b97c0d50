"""Find the text shards that a path stands for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megastruct.data.sources.formats import FORMATS, all_endings
from megastruct.data.sources.patience import DEFAULT_PATIENCE_SECONDS
from megastruct.data.sources.shards import TextShard
from megastruct.data.sources.storages import OTHER_ADDRESSES, STORAGES
from megastruct.errors import Problem, UserError


@dataclass(frozen=True)
class Search:
    """What a storage is asked for."""

    path: str  # as given by the user
    where: str  # the config key or option of the path, for messages
    patience_seconds: float
    cache_folder: Path | None  # stores which commit and files a dataset name stood for on first use
    commit: str | None  # the commit to use if the cache has none

    def text_names(self, names: list[str], what: str) -> list[str]:
        """The names among `names` that are text shards, sorted: all files of the first registered format that has any.

        JSONL files are used only if there is no parquet file, because next to parquet files they usually hold metadata.

        Raises:
            UserError: there is no text shard; `what` names the place that was searched.
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
    """All shards of `path`, sorted by name. `path` is a folder, a glob, a file, a Hugging Face dataset name,
    or an address such as s3://BUCKET/FOLDER.

    Relative paths are relative to the current directory. A local path takes precedence over a dataset of the same name.
    The commit and the files of a dataset are stored in `cache_folder`; if they are no longer there, `commit` gives the
    commit that the run started with.

    Args:
        where: config key or option of the path, for messages.
        patience_seconds: how long to retry a hub that fails.

    Raises:
        UserError: nothing is found, no file has a known ending, or the hub cannot be reached.
    """
    search = Search(path, where, patience_seconds, cache_folder, commit)
    for storage in (*STORAGES.values(), OTHER_ADDRESSES):
        shards = storage.find(search)
        if shards is not None:
            return shards
    found = f"{Path(path).expanduser().absolute()} does not exist"
    raise UserError(Problem(where, found, "give a folder, a glob or a file of text shards"))
