"""Datasets of the Hugging Face hub: listed at one commit, then read in byte ranges.

The files of a commit never change, whatever is pushed while a run reads them. Every request is made once, with a
timeout (HF_HUB_DOWNLOAD_TIMEOUT), and errors are raised immediately, so that retries happen in one place (patience.py).
Neither the hub's file system nor the streams of `datasets` are used. Both retry for minutes in nested loops and list
the repository in every process, and the streams read a shard from its start to resume in the middle.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from megastruct.data.sources.ranges import RangedBytes
from megastruct.errors import Problem, UserError

PREFIX = "hf://datasets/"
_MAY_PASS = (408, 425, 429)  # 4xx codes that a retry may cure: timeout, too early, too many requests
_PARTIAL, _NO_SUCH_RANGE = 206, 416
_OUT_OF_REACH = ("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol")


class HubFile(NamedTuple):
    """One file of a dataset at a commit."""

    path: str  # relative to the repository
    num_bytes: int
    content_id: str  # a hash of the contents


def list_dataset(name: str) -> tuple[str, list[HubFile]]:
    """The commit that `name` stands for, and all its files; `name` is ORG/NAME or ORG/NAME@(branch, tag or commit).

    Raises:
        Exception: any error of the library; `refused`, `out_of_reach` and `of_the_network` classify it.
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
    return str(commit), files


def at_commit(name: str, commit: str | None) -> str:
    """`name` with `commit` in place of its revision; `name` itself if `commit` is None."""
    return f"{name.partition('@')[0]}@{commit}" if commit else name


def uri_of(name: str, commit: str, path: str) -> str:
    """The address of a file: hf://datasets/ORG/NAME@COMMIT/PATH."""
    return f"{PREFIX}{at_commit(name, commit)}/{path}"


def commit_of(uri: str) -> str:
    """The commit in an address made by `uri_of`."""
    return uri.partition("@")[2].partition("/")[0]


class HubBytes(RangedBytes):
    """The bytes of a file at a commit; see `RangedBytes`.

    Raises:
        UserError: a read finds that the file has another size, or that the server ignores byte ranges.
        Exception: a read passes on any error of the library, and raises ConnectionError if bytes are missing.
    """

    def __init__(self, uri: str, num_bytes: int) -> None:
        from huggingface_hub import hf_hub_url

        super().__init__(num_bytes)
        repository, _, rest = uri.removeprefix(PREFIX).partition("@")
        commit, _, path = rest.partition("/")
        self._url = hf_hub_url(repository, path, repo_type="dataset", revision=commit)
        self._uri = uri

    def _read_range(self, start: int, num_bytes: int) -> bytes:
        # Without compression, because responses that are compressed on the fly do not support ranges.
        headers = {"Range": f"bytes={start}-{start + num_bytes - 1}", "Accept-Encoding": "identity"}
        with _answer(self._url, headers) as answer:
            total = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if answer.status_code == _NO_SUCH_RANGE or total not in ("", "*", str(self._num_bytes)):
                found = f"has {total or 'fewer'} bytes, but it had {self._num_bytes} when it was listed"
                raise UserError(Problem(self._uri, found, "start again, or download the dataset and give the folder"))
            _raise_for_status(answer)
            if answer.status_code != _PARTIAL and num_bytes < self._num_bytes:
                found = "the server ignores byte ranges and sends the whole file"
                raise UserError(Problem(self._uri, found, "download the dataset and give the folder"))
            content = answer.read()
        if len(content) != num_bytes:
            raise ConnectionError(f"the server sent {len(content):,} of {num_bytes:,} requested bytes")
        return content


def _get(url: str) -> Any:
    """The complete response to one request."""
    with _answer(url, {}) as answer:
        _raise_for_status(answer)
        answer.read()
    return answer


def _answer(url: str, headers: dict[str, str]) -> Any:
    """A context manager of the response to one request; its headers have arrived, its body is still to be read."""
    from huggingface_hub.utils import build_hf_headers, get_session

    return get_session().stream("GET", url, headers=build_hf_headers() | headers, timeout=_timeout_seconds())


def _raise_for_status(answer: Any) -> None:
    from huggingface_hub.utils import hf_raise_for_status

    if answer.status_code >= 400:
        answer.read()  # so that the library can quote the body
    hf_raise_for_status(answer)


def _timeout_seconds() -> float:
    """Timeout of connecting, and of each wait for more bytes."""
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT

    return HF_HUB_DOWNLOAD_TIMEOUT


def refused(error: BaseException) -> bool:
    """Whether the hub responded and denied the request (4xx)."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return 400 <= status < 500 and status not in _MAY_PASS


def offline(error: BaseException) -> bool:
    """Whether the library is set to work without the network (HF_HUB_OFFLINE)."""
    return type(error).__name__ == "OfflineModeIsEnabled"


def out_of_reach(error: BaseException) -> bool:
    """Whether no connection could be made."""
    return type(error).__name__ in _OUT_OF_REACH or offline(error)


def of_the_network(error: BaseException) -> bool:
    """Whether a retry may succeed: the network or the server failed, not the file or the program."""
    from huggingface_hub.errors import HTTPError

    passes = isinstance(error, (HTTPError, ConnectionError, TimeoutError))
    return passes and not refused(error) and not offline(error)
