"""Datasets of the Hugging Face hub: listed at one commit, whose files are then read by ranges of bytes.

Bytes of a commit never change, whatever is pushed while a run reads them. Every request is made once, with a limit of
time (HF_HUB_DOWNLOAD_TIMEOUT): what fails comes out at once, so that there is one place that is patient. That is why
neither the hub's file system nor the streams of `datasets` read here: both try again for minutes, one inside of the
other, list the repository in every process, and the streams read a shard from its start to go on in its middle.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

from megastruct.errors import Problem, UserError

PREFIX = "hf://datasets/"
_MAY_PASS = (408, 425, 429)  # of 4xx: too slow, too early, too often
_OUT_OF_REACH = ("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol", "OfflineModeIsEnabled")


class HubFile(NamedTuple):
    """A file of a dataset at a commit."""

    path: str  # in the repository
    num_bytes: int
    content_id: str  # a hash of the contents


def list_dataset(name: str) -> tuple[str, list[HubFile]]:
    """The commit that `name` (ORG/NAME, or ORG/NAME@ and a branch, a tag or a commit) stands for, and its files.

    Raises what the library raises; see `refused`, `out_of_reach` and `of_the_network`.
    """
    from huggingface_hub import HfApi  # slow to import, and few runs read from the hub

    repository, _, revision = name.partition("@")
    api = HfApi()
    commit = api.dataset_info(repository, revision=revision or None, expand=["sha"], timeout=_timeout_seconds()).sha
    files: list[HubFile] = []
    url: str | None = f"{api.endpoint}/api/datasets/{repository}/tree/{commit}?recursive=true"
    while url:
        page = _get(url)
        files += [
            HubFile(entry["path"], entry["size"], (entry.get("lfs") or entry)["oid"])
            for entry in page.json()
            if entry["type"] == "file"
        ]
        url = page.links.get("next", {}).get("url")
    return commit, files


def uri_of(name: str, commit: str, path: str) -> str:
    return f"{PREFIX}{name.partition('@')[0]}@{commit}/{path}"


def commit_of(uri: str) -> str:
    return uri.partition("@")[2].partition("/")[0]


class HubBytes(io.RawIOBase):
    """The bytes of a file at a commit; every read is one request for just these bytes."""

    def __init__(self, uri: str, num_bytes: int) -> None:
        from huggingface_hub import hf_hub_url

        repository, _, rest = uri.removeprefix(PREFIX).partition("@")
        commit, _, path = rest.partition("/")
        self._url = hf_hub_url(repository, path, repo_type="dataset", revision=commit)
        self._uri, self._num_bytes, self._position = uri, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        num_bytes = min(len(buffer), self._num_bytes - self._position)
        if num_bytes <= 0:
            return 0
        buffer[:num_bytes] = self._read_range(self._position, num_bytes)
        self._position += num_bytes
        return num_bytes

    def _read_range(self, start: int, num_bytes: int) -> bytes:
        answer = _get(self._url, {"Range": f"bytes={start}-{start + num_bytes - 1}"})
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if total not in ("", "*", str(self._num_bytes)):
            found = f"has {total} bytes, it had {self._num_bytes} when it was listed"
            raise UserError(Problem(self._uri, found, "start again; or download the dataset and give the folder"))
        if len(answer.content) != num_bytes:
            raise ConnectionError(f"{len(answer.content):,} bytes came where {num_bytes:,} were asked for")
        return answer.content


def _get(url: str, headers: dict[str, str] | None = None) -> Any:
    """The answer to one request."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    answer = get_session().get(url, headers=build_hf_headers() | (headers or {}), timeout=_timeout_seconds())
    hf_raise_for_status(answer)
    return answer


def _timeout_seconds() -> float:
    """For a connection, and for each wait for more bytes."""
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT

    return HF_HUB_DOWNLOAD_TIMEOUT


def refused(error: BaseException) -> bool:
    """Whether the hub answered, and the answer was no."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return 400 <= status < 500 and status not in _MAY_PASS


def out_of_reach(error: BaseException) -> bool:
    """Whether there was not even a connection."""
    return type(error).__name__ in _OUT_OF_REACH


def of_the_network(error: BaseException) -> bool:
    """Whether an error may pass, because it is about the way and not about the file or the program."""
    from huggingface_hub.errors import HTTPError

    return isinstance(error, (HTTPError, ConnectionError, TimeoutError)) and not refused(error)
