"""An S3 server on this machine: moto's, with faults on request. Its answers are noted in `requests`."""

from __future__ import annotations

import os
import re
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import boto3
import s3fs
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

ERROR = "<?xml version='1.0'?><Error><Code>{0}</Code><Message>{0} says the local S3</Message></Error>"
CODES = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}


class Request(NamedTuple):
    method: str
    path: str  # /BUCKET/KEY
    range: str


class _Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        pass

    def connection_dropped(self, *_: Any) -> None:
        pass


class LocalS3:
    """Serves from a thread between `with` and its end; `environment` is what a program needs to reach it."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._failures: list[list] = []  # [pattern of "METHOD /BUCKET/KEY", what, times left]
        self._app = DomainDispatcherApplication(create_backend_app)
        self.port = 0
        self.come_up()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.client = boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )

    def __enter__(self) -> LocalS3:
        s3fs.S3FileSystem.clear_instance_cache()  # those of an earlier server keep its port
        return self

    def __exit__(self, *_: object) -> None:
        self.go_down()

    def come_up(self) -> None:
        """Listen, on the same port as before, with the objects from before."""
        self._server = make_server("127.0.0.1", self.port, self._serve, threaded=True, request_handler=_Quiet)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def go_down(self) -> None:
        """Refuse every connection."""
        self._server.shutdown()
        self._thread.join()  # it closes the socket; a process forked before that would keep it open

    def bucket(self, objects: dict[str, bytes] | None = None) -> str:
        """The name of a new bucket with these objects."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        for key, content in (objects or {}).items():
            self.put(name, key, content)
        return name

    def put(self, bucket: str, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=bucket, Key=key, Body=content)

    def get(self, bucket: str, key: str) -> bytes:
        return self.client.get_object(Bucket=bucket, Key=key)["Body"].read()

    def keys(self, bucket: str) -> list[str]:
        return [entry["Key"] for entry in self.client.list_objects_v2(Bucket=bucket).get("Contents", [])]

    def fail(self, pattern: str, what: int | str | Callable[[], Any], times: int = 10**9) -> None:
        """Let the next `times` answers to "METHOD /BUCKET/KEY" that match go wrong: a status, "cut" or "reset".

        Or a function that is called before the answer, which may return one of these.
        """
        self._failures.append([re.compile(pattern), what, times])

    def recover(self) -> None:
        self._failures.clear()

    def _failure(self, name: str) -> Any:
        for failure in self._failures:
            if failure[2] and failure[0].search(name):
                failure[2] -= 1
                return failure[1]() if callable(failure[1]) else failure[1]
        return None

    def _serve(self, environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        request = Request(environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE", ""))
        self.requests.append(request)
        failure = self._failure(f"{request.method} {request.path}")
        if failure == "reset":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            start_response("500 Reset", [])
            return []
        if isinstance(failure, int):
            body = ERROR.format(CODES[failure]).encode()
            start_response(f"{failure} {CODES[failure]}", [("Content-Length", str(len(body)))])
            return [] if request.method == "HEAD" else [body]  # a client may fail on a body after HEAD
        body = self._app(environ, start_response)
        return self._halved(environ, body) if failure == "cut" else body

    @staticmethod
    def _halved(environ: dict[str, Any], body: Iterable[bytes]) -> Iterator[bytes]:
        content = b"".join(body)
        yield content[: len(content) // 2]
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)


def set_environment(server: LocalS3) -> dict[str, str]:
    """The variables of this process for a program that reaches `server`, without any other account."""
    return {key: value for key, value in os.environ.items() if not key.startswith("AWS_")} | server.environment
