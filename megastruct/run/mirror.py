"""The mirror of a run: a copy of its checkpoints and its other files at an address of fsspec.

    ADDRESS/NAME/config.yaml  data.json  metrics.jsonl  ...       the files of the run folder
    ADDRESS/NAME/checkpoints/step_00000100/checksums.json  ...    a checkpoint; checksums.json is written last

A checkpoint at the mirror is complete if it has its checksums.json. That file is written after all others and removed
before them, so an interrupted copy never counts.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TypeVar

from megastruct.checkpoint.checksums import MANIFEST_FILE, Checksum, parse_manifest, read_manifest
from megastruct.checkpoint.store import checkpoint_folder, step_in, step_of
from megastruct.config.schema import Config
from megastruct.data.cache import FOLDER_NAME as DATA_CACHE
from megastruct.data.sources.download import download, write
from megastruct.data.sources.fsspec_address import open_address, retried, store_errors, write_limit
from megastruct.profiling.files import FOLDER_NAME as PROFILE
from megastruct.run.run_folder import CHECKPOINTS
from megastruct.stops import STOP_FILE

WHERE = "checkpoint.mirror"
_FILES_AT_ONCE = 4
_DAMAGED = ".damaged"
_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory")  # without folders
T = TypeVar("T")


class DamagedError(Exception):
    """A checkpoint of the mirror is not what its checksums say."""


class Mirror:
    """The mirror of the run of `config`. No request is made before a method is called.

    Methods that write raise the errors of `store_errors`; their caller decides when to try again. Methods that read
    retry for `data.patience_seconds`.

    Raises:
        UserError: the scheme of the address is unknown, or the package for it is missing.
    """

    def __init__(self, config: Config) -> None:
        address = config.checkpoint.mirror
        assert address
        self.address = f"{address.rstrip('/')}/{config.run.name}"
        self._patience_seconds = config.data.patience_seconds
        self._system, path = open_address(self.address, WHERE)
        self._uploads, _ = open_address(self.address, WHERE, retries=True)
        self._path = path.rstrip("/")
        self._has_folders = address.partition("://")[0] not in _OBJECT_STORES
        self._copied: dict[str, tuple[int, int]] = {}  # (size, modification time) of the run's files, by name

    # Writing --------------------------------------------------------------------------------------------------------

    def check_writable(self) -> None:
        """Write and remove an empty object.

        Raises:
            UserError: the store cannot be reached, or does not allow it.
        """

        def write_and_remove() -> None:
            probe = f"{self._path}/.writable"
            with store_errors():
                if self._has_folders:
                    self._system.makedirs(self._path, exist_ok=True)
                self._system.pipe_file(probe, b"", **write_limit(self._system, 0))
                self._system.rm_file(probe)

        self._retried(write_and_remove, "written", at_start=True)

    def put_files(self, folder: Path) -> None:
        """Copy the files of the run folder that have changed since the last call: all that are not hidden.

        Checkpoints and other subfolders are left out, except the data cache and the traces.
        """
        for path in (*folder.iterdir(), *folder.glob(f"{DATA_CACHE}/*"), *folder.glob(f"{PROFILE}/*")):
            if path.name.startswith(".") or path.name == STOP_FILE or not path.is_file():
                continue
            name, status = path.relative_to(folder).as_posix(), path.stat()
            state = (status.st_size, status.st_mtime_ns)
            if self._copied.get(name) != state:
                self._put(path, f"{self._path}/{name}")
                self._copied[name] = state

    def put_checkpoint(self, checkpoint: Path, superseded: Callable[[Iterable[int]], list[int]]) -> None:
        """Copy a complete checkpoint, then remove those that `superseded` chooses among the steps of the mirror.

        A checkpoint whose files are there already is not copied again, so an interrupted copy continues.
        """
        target = f"{self._path}/{CHECKPOINTS}/{checkpoint.name}"
        manifest = (checkpoint / MANIFEST_FILE).read_bytes()
        found = self._content(f"{target}/{MANIFEST_FILE}")
        if found != manifest:
            if found is not None:
                self._remove(f"{target}/{MANIFEST_FILE}")
            for name in read_manifest(checkpoint):
                if self._copied.get(f"{target}/{name}") != _identity(checkpoint / name):
                    self._put(checkpoint / name, f"{target}/{name}")
                    self._copied[f"{target}/{name}"] = _identity(checkpoint / name)
            self._put(manifest, f"{target}/{MANIFEST_FILE}")
        for name in [name for name in self._copied if name.startswith(f"{target}/")]:
            del self._copied[name]
        self._remove_old(step_of(checkpoint), superseded)

    def set_aside(self, step: int) -> None:
        """Rename the checksums of a damaged checkpoint, so that it does not count among those to keep."""
        manifest = f"{self._path}/{CHECKPOINTS}/{checkpoint_folder(Path(), step).name}/{MANIFEST_FILE}"
        self._retried(lambda: self._put(self._content(manifest) or b"", f"{manifest}{_DAMAGED}"), "written")
        self._retried(lambda: self._remove(manifest), "removed")

    def _remove_old(self, newest: int, superseded: Callable[[Iterable[int]], list[int]]) -> None:
        """Remove superseded checkpoints, and what interrupted copies of earlier ones have left."""
        steps = self._steps()
        complete = [step for step, paths in steps.items() if _is_complete(paths)]
        left_over = [
            step
            for step, paths in steps.items()
            if step < newest and step not in complete and not any(path.endswith(_DAMAGED) for path in paths)
        ]
        for step in {*superseded(complete), *left_over} - {newest}:
            for path in sorted(steps[step], key=lambda path: posixpath.basename(path) != MANIFEST_FILE):
                self._remove(path)

    def _put(self, source: Path | bytes, target: str) -> None:
        with store_errors():
            if self._has_folders:
                self._uploads.makedirs(posixpath.dirname(target), exist_ok=True)
            if isinstance(source, bytes):
                self._uploads.pipe_file(target, source, **write_limit(self._uploads, len(source)))
            else:
                self._uploads.put_file(str(source), target, **write_limit(self._uploads, source.stat().st_size))

    def _remove(self, path: str) -> None:
        try:
            with store_errors():
                self._system.rm_file(path)
        except FileNotFoundError:
            pass

    # Reading --------------------------------------------------------------------------------------------------------

    def complete_steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first.

        Raises:
            UserError: the store cannot be reached, or denies the request.
        """
        steps = self._retried(self._steps, "listed", at_start=True)
        return sorted(step for step, paths in steps.items() if _is_complete(paths))

    def get_files(self, folder: Path) -> None:
        """Write the run's files, all but the checkpoints and the traces, into the run folder.

        Raises:
            UserError: the store cannot be reached, or a file cannot be written.
        """
        for path in self._retried(lambda: self._find(self._path), "listed"):
            name = PurePosixPath(posixpath.relpath(path, self._path))
            hidden = any(part.startswith(".") for part in name.parts)  # also ".."
            if name.parts[0] not in (CHECKPOINTS, PROFILE) and not hidden:
                self._get(path, folder / name)

    def get_checkpoint(self, step: int, folder: Path) -> None:
        """Write the files of a checkpoint into `folder`, and compare them with their checksums.

        Raises:
            DamagedError: they differ.
            UserError: the store cannot be reached, or a file cannot be written.
        """
        source = f"{self._path}/{CHECKPOINTS}/{checkpoint_folder(Path(), step).name}"
        content = self._retried(lambda: self._content(f"{source}/{MANIFEST_FILE}"), "read")
        try:
            manifest = parse_manifest((content or b"").decode())
        except ValueError as error:
            raise DamagedError(f"no readable checksums: {error}") from None

        def get(name: str) -> None:
            found = self._get(f"{source}/{name}", folder / name, manifest[name].num_bytes)
            if found != manifest[name]:
                raise DamagedError(f"{name} is not as it was written (another size or checksum)")

        if bad := [name for name in manifest if PurePosixPath(name).name != name]:
            raise DamagedError(f"{bad[0]!r} is no name of a file")
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            for result in [pool.submit(get, name) for name in manifest]:
                result.result()
        write(folder / MANIFEST_FILE, [content or b""])

    def _steps(self) -> dict[int, list[str]]:
        """The paths of the files of each checkpoint, by step, complete or not."""
        steps: dict[int, list[str]] = {}
        for path in self._find(f"{self._path}/{CHECKPOINTS}"):
            step = step_in(posixpath.basename(posixpath.dirname(path)))
            if step is not None:
                steps.setdefault(step, []).append(path)
        return steps

    def _find(self, path: str) -> list[str]:
        with store_errors():
            self._system.invalidate_cache()
            try:
                return self._system.find(path)
            except FileNotFoundError:
                return []

    def _content(self, path: str) -> bytes | None:
        """The bytes of a small file, None if it does not exist."""
        try:
            with store_errors():
                return self._system.cat_file(path)
        except FileNotFoundError:
            return None

    def _get(self, source: str, path: Path, num_bytes: int | None = None) -> Checksum:
        """Write a file of this machine from one of the mirror; returns its checksum."""
        size: int = self._retried(lambda: self._size(source), "read")
        if num_bytes is not None and size != num_bytes:
            raise DamagedError(f"{path.name} has {size} bytes instead of {num_bytes}")
        return Checksum(size, download(self._system, source, size, path, lambda get: self._retried(get, "read")))

    def _size(self, path: str) -> int:
        try:
            with store_errors():
                return self._system.info(path)["size"]
        except FileNotFoundError:
            raise DamagedError(f"{posixpath.basename(path)} is missing") from None

    def _retried(self, action: Callable[[], T], done: str, at_start: bool = False) -> T:
        return retried(action, self.address, WHERE, self._patience_seconds, done, at_start=at_start)


def _is_complete(paths: list[str]) -> bool:
    return any(posixpath.basename(path) == MANIFEST_FILE for path in paths)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns
