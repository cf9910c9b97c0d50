"""The storage of Hugging Face datasets; a dataset name is pinned to a commit on first use."""

from __future__ import annotations

import io
import re
from dataclasses import astuple
from typing import TYPE_CHECKING

from megastruct.data.cache import cached_json, key_of
from megastruct.data.protocols import FileState
from megastruct.data.sources import hub
from megastruct.data.sources.patience import patiently, reason
from megastruct.data.sources.shards import TextShard
from megastruct.errors import Problem, UserError

if TYPE_CHECKING:
    from megastruct.data.sources.find import Search

_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


class HubFiles:
    """The files of a dataset, given as ORG/NAME or ORG/NAME@REVISION; see `Storage`."""

    request_bytes = 4 << 20  # a request takes at least a tenth of a second

    def find(self, search: Search) -> list[TextShard] | None:
        """As in `Storage`. The commit and its files are stored in `search.cache_folder` on first use."""
        if not _NAME.fullmatch(search.path):
            return None
        name = f"hub-{key_of(search.path)}"
        found = cached_json(search.cache_folder, name, lambda: [astuple(shard) for shard in _listed(search)])
        return [TextShard(*values) for values in found]

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


def _listed(search: Search) -> list[TextShard]:
    """The shards of the dataset. A failing hub is retried; an unreachable one is not: the name may be a wrong path."""
    name, where = hub.at_commit(search.path, search.commit), search.where
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
    shown = {file.path: file for file in files if not file.path.rpartition("/")[2].startswith(".")}
    chosen = search.text_names(list(shown), f"the Hugging Face dataset {name}")
    return [TextShard(hub.uri_of(name, commit, path), *shown[path]) for path in chosen]
