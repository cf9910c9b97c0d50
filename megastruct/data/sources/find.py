"""Find the text shards that a path stands for."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from megastruct.data.sources.choice import EVERYTHING, Choice
from megastruct.data.sources.notes import counted, named, not_read
from megastruct.data.sources.patience import DEFAULT_PATIENCE_SECONDS
from megastruct.data.sources.select import Selection
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
    choice: Choice = EVERYTHING
    notes: list[str] = field(default_factory=list)  # lines about the selection, for the user; filled by `text_names`

    def text_names(
        self,
        names: list[str],
        what: str,
        read: Callable[[str], bytes] | None = None,
        is_explicit: bool = False,
    ) -> list[str]:
        """The names among `names` that are text shards of the chosen configuration and split, sorted.

        What is not read is noted in `notes`.

        Args:
            names: of all files, relative to the place.
            what: the place, for messages.
            read: reads a small file of the place, for the dataset card.
            is_explicit: whether the user gave the files themselves, as one file or by a pattern.

        Raises:
            UserError: there is no text shard, or there are several configurations or splits and none is chosen.
        """
        selection = Selection(names, what, self.where, self.choice, read, is_explicit)
        chosen = [("configuration", selection.config), ("split", selection.split)]
        if described := ", ".join(f"{key} {value}" for key, value in chosen if value):
            self.notes.append(described)
        self.notes.extend(selection.notes)
        return selection.names

    def folders_of_pattern(self, folders: Collection[str], files: Sequence[str]) -> None:
        """Note the folders that a pattern names, unless it names files in them, too: they are not searched.

        Raises:
            UserError: it names folders and no file.
        """
        inside = {str(parent) for file in files for parent in PurePosixPath(file).parents}
        others = sorted(set(folders) - inside)
        if others and not files:
            found = f"{self.path} names {counted(len(others), 'folder')} and no file{named(others)}"
            raise UserError(Problem(self.where, found, f"their files: {shlex.quote(self.path.rstrip('/') + '/**')}"))
        self.notes.extend(not_read("named by the pattern, which should name files", others, "folder"))


def find_shards(
    path: str,
    where: str,
    patience_seconds: float = DEFAULT_PATIENCE_SECONDS,
    cache_folder: Path | None = None,
    commit: str | None = None,
    choice: Choice = EVERYTHING,
    notes: list[str] | None = None,
) -> list[TextShard]:
    """All shards of `path`, sorted by name. `path` is a folder, a glob, a file, a Hugging Face dataset name,
    or an address such as s3://BUCKET/FOLDER.

    Relative paths are relative to the current directory. A local path takes precedence over a dataset of the same name.
    The commit and the files of a dataset are stored in `cache_folder`; if they are no longer there, `commit` gives the
    commit that the run started with.

    Args:
        where: config key or option of the path, for messages.
        patience_seconds: how long to retry a hub that fails.
        choice: the configuration, the split and the files that are meant.
        notes: receives a line for what was chosen, and one for each kind of files that are not read.

    Raises:
        UserError: nothing is found, no file has a known ending, the place has several configurations or splits of
            which none is chosen, or the hub cannot be reached.
    """
    search = Search(path, where, patience_seconds, cache_folder, commit, choice, [] if notes is None else notes)
    for storage in (*STORAGES.values(), OTHER_ADDRESSES):
        shards = storage.find(search)
        if shards is not None:
            return shards
    found = f"{Path(path).expanduser().absolute()} does not exist"
    raise UserError(Problem(where, found, "give a folder, a glob or a file of text shards"))
