"""The storage of Hugging Face datasets; a dataset name is pinned to a commit on first use."""

from __future__ import annotations

import io
import os
import re
from dataclasses import astuple
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from megastruct.data.cache import cached_json, key_of
from megastruct.data.protocols import FileState
from megastruct.data.sources import hub
from megastruct.data.sources.patience import patiently, reason
from megastruct.data.sources.shards import TextShard
from megastruct.errors import Problem, UserError

if TYPE_CHECKING:
    from megastruct.data.sources.find import Search

_NAME = re.compile(r"(\w[\w.-]*/[\w.-]+)((?:/[^@]+)?)(?:@([\w./-]+))?")
# As in the addresses of huggingface_hub: behind @ stands a revision, up to the next slash.
_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@(refs/(?:convert|pr)/[\w.-]+|[^/@]+))?((?:/.*)?)")


class HubPlace(NamedTuple):
    """A dataset, or a part of it."""

    name: str  # ORG/NAME or ORG/NAME@REVISION
    inside: str  # a folder, a file or a pattern in the repository; "" for all of it

    @classmethod
    def of(cls, path: str) -> HubPlace | None:
        """What `path` stands for; None if it has the form of no dataset."""
        if match := _ADDRESS.fullmatch(path):
            repository, revision, inside = match.groups()
        elif match := _NAME.fullmatch(path):
            repository, inside, revision = match.groups()
        else:
            return None
        revision = unquote(revision or "")
        return cls(f"{repository}@{revision}" if revision else repository, inside.strip("/"))


class HubFiles:
    """The files of a dataset; see `Storage`.

    A path is ORG/NAME, ORG/NAME/FOLDER or one of both with @REVISION at the end, or an address of the library:
    hf://datasets/ORG/NAME@REVISION/FOLDER, where a file or a pattern may stand in place of the folder.
    """

    request_bytes = 4 << 20  # a request takes at least a tenth of a second

    def find(self, search: Search) -> list[TextShard] | None:
        """As in `Storage`. The commit and its files are stored in `search.cache_folder` on first use."""
        place = HubPlace.of(search.path)
        if place is None:
            return None
        choice = [astuple(search.choice)] if search.choice else []
        name = f"hub-{key_of(search.path, *choice)}"
        listed = lambda: {"shards": _listed(search, place), "notes": search.notes}  # noqa: E731
        found = cached_json(search.cache_folder, name, listed)
        if isinstance(found, list):  # stored before notes were
            found = {"shards": found, "notes": []}
        search.notes[:] = found["notes"]
        return [TextShard(*values) for values in found["shards"]]

    def open(self, shard: TextShard) -> io.RawIOBase:
        """As in `Storage`."""
        return hub.HubBytes(shard.uri, shard.num_bytes)

    def state(self, shard: TextShard) -> FileState:
        """As in `Storage`: always the state when the shard was found, because a commit does not change."""
        return FileState(shard.num_bytes, shard.content_id)

    def commit_of(self, shard: TextShard) -> str | None:
        """As in `Storage`."""
        return hub.commit_of(shard.uri)

    def may_pass(self, shard: TextShard, error: Exception) -> bool:
        """As in `Storage`: errors of the network and of the server."""
        return hub.of_the_network(error)

    def refusal(self, shard: TextShard, error: Exception) -> Problem | None:
        """As in `Storage`: responses 4xx, and the offline mode of the library."""
        if hub.refused(error):
            suggestion = "check the name, log in (hf auth login), and request access if it is gated; or download it"
            return Problem(
                shard.uri, f"cannot be read because the hub rejects the request ({reason(error)})", suggestion
            )
        if hub.offline(error):
            found = "cannot be read because HF_HUB_OFFLINE is set"
            return Problem(shard.uri, found, "set HF_HUB_OFFLINE=0, or download the dataset and give the folder")
        return None


def _listed(search: Search, place: HubPlace) -> list[tuple[Any, ...]]:
    """The fields of the shards. A failing hub is retried; an unreachable one is not: the name may be a wrong path."""
    name, where = hub.at_commit(place.name, search.commit), search.where
    may_pass = lambda error: hub.of_the_network(error) and not hub.out_of_reach(error)  # noqa: E731
    try:
        commit, files = patiently(lambda: hub.list_dataset(name), name, search.patience_seconds, may_pass, "listed")
    except UserError as error:
        raise UserError([Problem(where, str(problem)) for problem in error.problems]) from None
    except Exception as error:  # the libraries have no common class for network errors
        if hub.refused(error):
            found = f"{name} is not a local path, and the Hugging Face hub rejects it as a dataset ({reason(error)})"
            suggestion = "correct the path or the dataset's name or revision; log in (hf auth login) if it is private"
        else:
            found = f"{name} is not a local path, and it cannot be listed as a Hugging Face dataset ({reason(error)})"
            suggestion = "correct the path, check the network, or download the dataset and give the folder"
        raise UserError(Problem(where, found, suggestion)) from None
    inside, is_explicit, folders = _inside(files, place.inside)
    search.folders_of_pattern(folders, [file.path for file in inside.values()])
    if place.inside and not inside:
        found = f"the Hugging Face dataset {name} has no {place.inside} among its {len(files)} files"
        raise UserError(Problem(where, found, "correct the folder, or leave it out"))

    def read(card: str) -> bytes:
        shard = TextShard(hub.uri_of(name, commit, inside[card].path), card, *inside[card][1:])
        return patiently(lambda: _contents(shard), shard.uri, search.patience_seconds, hub.of_the_network)

    what = f"the Hugging Face dataset {name}" + f"/{place.inside}" * bool(place.inside)
    chosen = search.text_names(list(inside), what, read, is_explicit)
    return [(hub.uri_of(name, commit, inside[path].path), path, *inside[path][1:]) for path in chosen]


def _inside(files: list[hub.HubFile], inside: str) -> tuple[dict[str, hub.HubFile], bool, list[str]]:
    """The files of a folder, one file, or those that match a pattern, by their names below the folder.

    Also returns whether the user gave the files themselves, which a folder does not; and the folders that match.
    """
    folder = f"{inside}/" if inside else ""
    if found := {file.path.removeprefix(folder): file for file in files if file.path.startswith(folder)}:
        return found, False, []
    from fsspec.utils import glob_translate  # not in worker processes, which list nothing

    pattern = re.compile(glob_translate(inside))
    matching = [file for file in files if file.path == inside or pattern.fullmatch(file.path)]
    root = os.path.commonpath([os.path.dirname(file.path) for file in matching]) if matching else ""
    folders = {str(parent) for file in files for parent in PurePosixPath(file.path).parents} - {"."}
    named = sorted(filter(pattern.fullmatch, folders))
    return {os.path.relpath(file.path, root or "."): file for file in matching}, True, named


def _contents(shard: TextShard) -> bytes:
    """The contents of a small file."""
    try:
        return hub.HubBytes(shard.uri, shard.num_bytes).read(shard.num_bytes) or b""
    except Exception as error:
        if hub.refused(error):
            return b""
        raise
