"""Copies of token shards that are given by an address, on a disk of this machine.

Training reads rows of a few kilobytes in a random order, which takes a local file: from an object store, every row
would be a request of its own. So a folder at an address is copied as a whole before training, once per machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megastruct.data.cache import key_of
from megastruct.data.sources.download import download, write
from megastruct.data.sources.fsspec_address import open_address, retried, store_errors
from megastruct.data.sources.patience import DEFAULT_PATIENCE_SECONDS
from megastruct.data.tokens.manifest import MANIFEST_NAME, SPLITS, Manifest, parse_manifest
from megastruct.errors import Problem, UserError
from megastruct.files import FileLock

DEFAULT_CACHE = "~/.cache/megastruct/tokens"
_FILES_AT_ONCE = 8


def fetch_folder(
    address: str, where: str, cache: str | None = None, patience_seconds: float = DEFAULT_PATIENCE_SECONDS
) -> Path:
    """The local copy of the folder of token shards at `address`, made first if it is missing or incomplete.

    Every file is compared with the size and the SHA-256 in the manifest while it is copied. Another manifest at the
    same address is another copy. Processes that ask at once wait for the one that copies.

    Args:
        where: config key or option of the address, for messages.
        cache: folder that holds the copies (None: ~/.cache/megastruct/tokens).
        patience_seconds: how long to retry a store that fails.

    Raises:
        UserError: there are no token shards, the store cannot be reached, a file is damaged or cannot be written.
    """
    system, root = open_address(address, where)
    root = root.rstrip("/")

    def patient(action: Callable[[], Any], at_start: bool = False) -> Any:
        return retried(action, address, where, patience_seconds, "read", at_start=at_start)

    content = patient(lambda: _content(system, f"{root}/{MANIFEST_NAME}"), at_start=True)
    if content is None:
        suggestion = "make token shards with tools/prepare_data.py, or read text directly with data.kind=text"
        raise UserError(Problem(where, f"{address} has no {MANIFEST_NAME}", suggestion))
    manifest = parse_manifest(content, f"{address}/{MANIFEST_NAME}")
    folder = Path(cache or DEFAULT_CACHE).expanduser().absolute() / key_of(address, hashlib.sha256(content).hexdigest())
    with _alone(folder):
        if not (folder / MANIFEST_NAME).is_file():
            _copy(system, root, address, manifest, folder, patient)
            write(folder / MANIFEST_NAME, [content])
    return folder


def _copy(system: Any, root: str, address: str, manifest: Manifest, folder: Path, patient: Callable[..., Any]) -> None:
    """Download the files that are not there yet: the token files and the tokenizer."""
    files = [file for split in SPLITS for file in getattr(manifest.splits, split)]
    wanted: dict[str, tuple[int, str]] = {file.file: (file.num_bytes, file.sha256) for file in files}
    tokenizer = manifest.settings.tokenizer
    size = patient(lambda: _size(system, f"{root}/{tokenizer.file}"))
    wanted[tokenizer.file] = (size, tokenizer.fingerprint)
    missing = [name for name, (num_bytes, _) in wanted.items() if not _is_there(folder / name, num_bytes)]
    num_bytes = sum(wanted[name][0] for name in missing)
    print(f"copying {len(missing)} files ({num_bytes / 1e9:.2f} GB) of {address} to {folder}", file=sys.stderr)

    def copy(name: str) -> None:
        num_bytes, sha256 = wanted[name]
        found = download(system, f"{root}/{name}", num_bytes, folder / name, patient)
        if found != sha256:
            (folder / name).unlink()
            problem = "its SHA-256 is not the one in the manifest; it is damaged, or was changed"
            raise UserError(Problem(f"{address}/{name}", problem, "copy the folder to the store again"))

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for result in [pool.submit(copy, name) for name in missing]:
            result.result()


def _is_there(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes


def _content(system: Any, path: str) -> bytes | None:
    with contextlib.suppress(FileNotFoundError), store_errors():
        return system.cat_file(path)
    return None


def _size(system: Any, path: str) -> int:
    with store_errors():
        return system.info(path)["size"]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / ".lock", wait=True, temporary=True))
        except OSError as error:
            found = f"{folder} cannot be written ({error.strerror})"
            raise UserError(
                Problem("data.token_cache", found, "data.token_cache=FOLDER on a disk with space")
            ) from None
        yield
