"""The storage of object stores and of all other file systems that fsspec knows, read in byte ranges."""

from __future__ import annotations

import posixpath
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from megastruct.data.protocols import FileState
from megastruct.data.sources.changes import refuse_changed
from megastruct.data.sources.fsspec_address import (
    StoreError,
    StoreRefusedError,
    is_address,
    open_address,
    refusal_of,
    retried,
    store_errors,
    version_of,
)
from megastruct.data.sources.notes import is_hidden, not_read
from megastruct.data.sources.ranges import RangedBytes
from megastruct.data.sources.shards import MANIFEST_NAME, TextShard
from megastruct.errors import Problem, UserError

if TYPE_CHECKING:
    from megastruct.data.sources.find import Search

_Infos = dict[str, dict[str, Any]]  # what fsspec says of files, by path in the store


class ObjectFiles:
    """A folder (all objects below a prefix), a pattern, or a single object, as SCHEME://BUCKET/PATH; see `Storage`."""

    request_bytes = 4 << 20  # a request takes a few hundredths of a second

    def find(self, search: Search) -> list[TextShard] | None:
        """As in `Storage`. A failing store is retried; an unreachable one once only: the address may be wrong."""
        if not is_address(search.path):
            return None
        system, path = open_address(search.path, search.where)
        list_it = partial(_listed, search, system, path.rstrip("/"))
        root, infos = retried(list_it, search.path, search.where, search.patience_seconds, "listed", at_start=True)
        if not infos:
            suggestion = "correct the address: a folder, a pattern or an object of a bucket that exists"
            raise UserError(Problem(search.where, f"{search.path}: nothing is there", suggestion))
        return _shards(search, system, root, infos)

    def open(self, shard: TextShard) -> RangedBytes:
        """As in `Storage`."""
        return _ObjectBytes(shard)

    def state(self, shard: TextShard) -> FileState:
        """As in `Storage`; the version is the entity tag, the generation or the time of the last change."""
        system, path = open_address(shard.uri, shard.uri)
        with store_errors():
            return _state(system, path)

    def commit_of(self, shard: TextShard) -> str | None:
        """As in `Storage`: always None."""
        return None

    def may_pass(self, shard: TextShard, error: Exception) -> bool:
        """As in `Storage`: errors of the network and of the server."""
        return isinstance(error, StoreError)

    def refusal(self, shard: TextShard, error: Exception) -> Problem | None:
        """As in `Storage`: missing or insufficient credentials, and other requests that the store rejects."""
        return refusal_of(shard.uri, error) if isinstance(error, StoreRefusedError) else None


class _ObjectBytes(RangedBytes):
    """The bytes of an object. After each range the state of the object is compared with that in which it was found.

    Raises:
        UserError: the object was changed, which a read would mix with the old content.
        StoreError, StoreRefusedError, FileNotFoundError: a read failed.
    """

    def __init__(self, shard: TextShard) -> None:
        super().__init__(shard.num_bytes)
        self._shard = shard
        self._system, self._path = open_address(shard.uri, shard.uri)

    def _read_range(self, start: int, num_bytes: int) -> bytes:
        try:
            with store_errors():
                content = self._system.cat_file(self._path, start=start, end=start + num_bytes)
        except StoreRefusedError:  # also a range behind the end of an object that has become shorter
            self._refuse_changed()
            raise
        self._refuse_changed()
        if len(content) != num_bytes:
            raise StoreError(f"the store sent {len(content):,} of {num_bytes:,} requested bytes")
        return content

    def _refuse_changed(self) -> None:
        with store_errors():
            refuse_changed(self._shard, _state(self._system, self._path))


def _state(system: Any, path: str) -> FileState:
    system.invalidate_cache()
    info = system.info(path)
    return FileState(info["size"], version_of(info))


def _listed(search: Search, system: Any, path: str) -> tuple[str, _Infos]:
    """(folder of the names, what the store says of each object, by path) of a folder, an object or a pattern."""
    infos: _Infos = {}
    with suppress(FileNotFoundError), store_errors():  # no such bucket, or for some stores no such folder
        system.invalidate_cache()
        infos = _objects(system.find(path, detail=True))
        if set(infos) - {path}:
            return path, infos
        if not infos and set("*?[") & set(path):
            named = system.glob(path, detail=True)
            infos = _objects(named)
            search.folders_of_pattern([name for name in named if name not in infos], list(infos))
    return posixpath.commonpath([posixpath.dirname(name) for name in infos]) if infos else path, infos


def _content(system: Any, paths: dict[str, str], name: str) -> bytes:
    with store_errors():
        return system.cat_file(paths[name])


def _objects(infos: _Infos) -> _Infos:
    return {name: info for name, info in infos.items() if info["type"] == "file" and not name.endswith("/")}


def _shards(search: Search, system: Any, root: str, infos: _Infos) -> list[TextShard]:
    if f"{root}/{MANIFEST_NAME}" in infos:
        found = f"{search.path} holds token shards ({MANIFEST_NAME})"
        suggestion = "train with data.kind=tokens, or give the text that the token shards were made from"
        raise UserError(Problem(search.where, found, suggestion))
    names = {posixpath.relpath(name, root): name for name in infos}
    is_explicit = root != search.path.rstrip("/").partition("://")[2]  # an object or a pattern
    hidden = sorted(filter(is_hidden, names)) if is_explicit and len(names) > 1 else []
    read = partial(_content, system, names)
    shown = [name for name in names if name not in hidden]
    chosen = {name: names[name] for name in search.text_names(shown, search.path, read, is_explicit)}
    search.notes.extend(not_read("hidden", hidden))
    return [
        TextShard(system.unstrip_protocol(path), name, infos[path]["size"], version_of(infos[path]))
        for name, path in chosen.items()
    ]
