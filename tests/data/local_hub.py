"""A hub of datasets on this machine: as much of the Hugging Face hub's HTTP as reading datasets takes.

    GET  /api/datasets/ORG/NAME                     the newest commit of main
    GET  /api/datasets/ORG/NAME/revision/REV        the commit of a branch or of a commit
    GET  /api/datasets/ORG/NAME/tree/REV[/FOLDER]   files and folders, `recursive`, in pages with a Link header
    POST /api/datasets/ORG/NAME/paths-info/REV      the same of single paths
    GET, HEAD /datasets/ORG/NAME/resolve/REV/PATH   a redirect to another host, as for large files
    GET, HEAD /cdn/SHA256                           bytes, ranges of them too

Every answer is noted in `requests`; `fail` makes answers go wrong.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

PAGE_SIZE = 1000


class Request(NamedTuple):
    path: str  # without the query; of bytes the path in the repository
    is_bytes: bool  # of a file, not what is known of it
    status: int
    num_bytes: int  # of the answer's body
    authorization: str | None


class LocalHub:
    """Serves from a thread between `with` and its end; `url` is what HF_ENDPOINT has to be."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}  # files by path
        self.revisions: dict[str, dict[str, str]] = {}  # of every repository: commit by branch
        self.blobs: dict[str, tuple[str, bytes]] = {}  # (path, content) by sha256
        self.requests: list[Request] = []
        self.page_size = PAGE_SIZE
        self.has_ranges = True
        self._failures: list[list] = []  # [pattern, what, times left]
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.go_down()

    def go_down(self) -> None:
        """Refuse every connection, and answer nothing on those that are open."""
        if not self._closed.is_set():
            self._closed.set()  # lets go what hangs
            self._server.shutdown()
            self._server.server_close()

    def commit(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Make a commit of these files and no others; its id."""
        named = [repository, branch, *sorted((path, hashlib.sha256(files[path]).hexdigest()) for path in files)]
        commit = hashlib.sha1(json.dumps(named).encode()).hexdigest()
        self.commits[commit] = files
        self.revisions.setdefault(repository, {})[branch] = commit
        self.blobs |= {hashlib.sha256(content).hexdigest(): (path, content) for path, content in files.items()}
        return commit

    def fail(self, pattern: str, what: int | str | Callable[[], None], times: int = 10**9) -> None:
        """Let the next `times` answers whose path matches go wrong: a status, "cut" (half a body), "hang" or "reset".

        Or a function that is called before the answer, and returns one of these or None.
        """
        self._failures.append([re.compile(pattern), what, times])

    def recover(self) -> None:
        self._failures.clear()

    def failure(self, path: str) -> int | str | Callable[[], None] | None:
        with self._lock:
            for failure in self._failures:
                if failure[2] and failure[0].search(path):
                    failure[2] -= 1
                    return failure[1]
        return None

    def bytes_of(self, path: str) -> int:
        """Bytes that were sent of a file."""
        return sum(request.num_bytes for request in self.requests if request.is_bytes and request.path == path)

    def is_down(self, after_seconds: float = 0.0) -> bool:
        return self._closed.wait(after_seconds)


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path.startswith("/cdn/"):
            return self._send_bytes(*self.hub.blobs[url.path.rpartition("/")[2]])
        match = re.fullmatch(r"/(?:api/)?datasets/([^/]+/[^/]+)(?:/(\w[\w-]*)/([^/]+)(?:/(.*))?)?", url.path)
        if not match:
            return self._refuse(404, "NotFound")
        repository, what, revision, path = match.groups()
        branches = self.hub.revisions.get(repository)
        if branches is None:
            return self._refuse(404 if self.headers["Authorization"] else 401, "RepoNotFound")
        revision = unquote(revision or "main")
        commit = branches.get(revision, revision)
        if commit not in self.hub.commits:
            return self._refuse(404, "RevisionNotFound")
        files = self.hub.commits[commit]
        path = unquote(path or "")
        if what == "resolve":
            return self._redirect(commit, files[path]) if path in files else self._refuse(404, "EntryNotFound")
        if what == "tree":
            return self._send_tree(files, path, parse_qs(url.query))
        if what == "paths-info":
            wanted = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
            return self._send_json([_entry(path, files[path]) for path in wanted if path in files])
        return self._send_json({"id": repository, "sha": commit, "siblings": [{"rfilename": path} for path in files]})

    do_HEAD = do_POST = do_GET

    def _send_tree(self, files: dict[str, bytes], folder: str, query: dict[str, list[str]]) -> None:
        inside = [path for path in sorted(files) if not folder or path.startswith(folder + "/")]
        folders = {str(parent) for path in inside for parent in PurePosixPath(path).parents} - {".", folder}
        entries = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        entries += [_entry(path, files[path]) for path in inside]
        if query["recursive"][0].lower() != "true":
            entries = [entry for entry in entries if str(PurePosixPath(entry["path"]).parent) == (folder or ".")]
        if folder and not entries:
            return self._refuse(404, "EntryNotFound")
        first = int(query.get("cursor", ["0"])[0])
        last = first + self.hub.page_size
        url = f"{self.hub.url}{urlsplit(self.path).path}?recursive={query['recursive'][0]}&cursor={last}"
        headers = {"Link": f'<{url}>; rel="next"'} if last < len(entries) else {}
        return self._send_json(entries[first:last], headers)

    def _redirect(self, commit: str, content: bytes) -> None:
        digest = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": commit, "X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{digest}"'}
        self._send(302, b"", headers | {"Location": f"http://localhost:{self.hub.port}/cdn/{digest}"})

    def _send_bytes(self, path: str, content: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        # As CloudFront does: what may be compressed is sent as a whole.
        if not wanted or not self.hub.has_ranges or "gzip" in (self.headers["Accept-Encoding"] or ""):
            return self._send(200, content, headers, path)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._send(206, content[first : last + 1], headers, path)

    def _send_json(self, value, headers=None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": f"{code} says the local hub"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], path: str | None = None) -> None:
        """`path`: of the file whose bytes these are."""
        name = path or urlsplit(self.path).path
        failure = self.hub.failure(name)
        if callable(failure):
            failure = failure()
        if isinstance(failure, int):
            status, body, headers = failure, b"", {"Retry-After": "2"} if failure == 429 else {}
        if failure == "hang":
            self.hub.is_down(after_seconds=60)
        if self.hub.is_down():
            failure = "reset"
        sent = body[: len(body) // 2] if failure == "cut" else body
        note = Request(
            name, bool(path), 0 if isinstance(failure, str) else status, len(sent), self.headers["Authorization"]
        )
        self.hub.requests.append(note)
        self.close_connection = isinstance(failure, str)
        if failure in ("hang", "reset"):
            return
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)

    def log_message(self, *_) -> None:
        pass


def _entry(path: str, content: bytes) -> dict:
    digest = hashlib.sha256(content).hexdigest()
    lfs = {"oid": digest, "size": len(content), "pointerSize": 134}
    return {"type": "file", "path": path, "size": len(content), "oid": digest[:40], "lfs": lfs}
