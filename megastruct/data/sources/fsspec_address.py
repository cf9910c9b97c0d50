"""Access to object stores and other file systems through fsspec: s3://BUCKET/..., gs://BUCKET/..., and so on.

Credentials, endpoints and other options come from the environment, as the packages of fsspec read them: for S3
AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, ..., and FSSPEC_S3 for anything else. Every error of such a package
becomes one of the classes of this file, so that one place decides which errors may pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from megastruct.data.sources.patience import patiently, reason
from megastruct.errors import Problem, UserError

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://.*", re.DOTALL)
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # the extra of this project, by scheme
_MAY_PASS = (408, 409, 425, 429)  # 3xx and 4xx codes that a retry may cure: timeout, conflict, too early, too many
_OUT_OF_REACH = re.compile(r"EndpointConnectionError|ConnectTimeout\w*|ClientConnector\w*|ProxyConnection\w*|gaierror")
_BAD_SETTINGS = re.compile(
    r"(No|Partial|Default)Credentials(Error)?|ProfileNotFound|ParamValidationError|NoRegionError|InvalidRegionError"
    r"|\w*SSO\w*|ConfigParseError|\w*InvalidURL\w*|InvalidProxiesConfigError"
)

_WRITE_SECONDS, _SLOWEST_BYTES_PER_SECOND = 20.0, 200e3  # a write that takes longer counts as failed

T = TypeVar("T")


class StoreError(OSError):
    """The store, or the network on the way to it, failed; a retry may succeed."""


class OutOfReachError(StoreError):
    """No connection could be made."""


class StoreRefusedError(OSError):
    """The store denies the request, or the settings do not allow one; a retry is of no use."""


def is_address(path: str) -> bool:
    """Whether `path` is an address (SCHEME://...) and not a path of this machine."""
    return _ADDRESS.fullmatch(path) is not None


def open_address(address: str, where: str, *, retries: bool = False) -> tuple[Any, str]:
    """(file system of fsspec, path in it) of an address. No request is made.

    `where`: config key or option of the address, for messages. `retries`: let the package retry failed requests for a
    few seconds, as is good for large uploads; otherwise every request is made once, where the package allows it.

    Raises:
        UserError: the scheme is unknown, or the package for it is missing or cannot be used.
    """
    import fsspec

    match = _ADDRESS.fullmatch(address)
    assert match
    scheme = match[1]
    try:
        system, path = fsspec.core.url_to_fs(address, **_options(scheme, retries))
    except ImportError as error:
        extra = f"pip install 'megastruct[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else str(error)
        found = f"{address} needs a Python package that is not installed ({error})"
        raise UserError(Problem(where, found, extra)) from None
    except ValueError as error:
        known = ", ".join(f"{name}://" for name in ("s3", "gs", "hf", "file"))
        raise UserError(
            Problem(where, f"{address}: {error}", f"an address that fsspec knows, such as {known}")
        ) from None
    except Exception as error:  # a missing profile, a config file that cannot be parsed
        raise UserError(Problem(where, f"{address} cannot be used ({reason(error)})", _SETTINGS)) from None
    if not retries and scheme in ("s3", "s3a"):
        system.retries = 1
    if not path.strip("/"):
        raise UserError(Problem(where, f"{address} names no bucket or folder", f"{scheme}://BUCKET/FOLDER"))
    return system, path


_SETTINGS = "check the address and the settings and credentials in the environment"


def refusal_of(uri: str, error: StoreRefusedError, done: str = "read") -> Problem:
    """The problem of an address that the store refuses; `done` is a participle for what could not be done."""
    return Problem(uri, f"cannot be {done} because the store rejects the request ({error})", _SETTINGS)


def retried(
    action: Callable[[], T], address: str, where: str, patience_seconds: float, done: str, *, at_start: bool = False
) -> T:
    """What `action` returns. It is retried for `patience_seconds` while the store fails.

    `where`: config key or option of the address, for messages. `done`: a participle that says what is tried.
    `at_start`: a store that is out of reach is tried twice only, because the address may be wrong.

    Raises:
        UserError: the store failed for that long, cannot be reached, denies the request, or has no such object.
    """

    num_unreached = 0

    def may_pass(error: Exception) -> bool:
        nonlocal num_unreached
        num_unreached += isinstance(error, OutOfReachError)
        return isinstance(error, StoreError) and not (at_start and num_unreached > 1)

    try:
        return patiently(action, address, patience_seconds, may_pass, done)
    except StoreRefusedError as error:
        problem = refusal_of(address, error, done)
    except FileNotFoundError as error:
        problem = Problem(address, f"does not exist ({error})", "an address in a bucket that exists")
    except OutOfReachError as error:
        problem = Problem(address, f"cannot be reached ({error})", "check the address, the endpoint and the network")
    except UserError as error:
        raise UserError(
            [Problem(where, f"{found.where} {found.found}", found.suggestion) for found in error.problems]
        ) from None
    raise UserError(Problem(where, f"{problem.where} {problem.found}", problem.suggestion))


def write_limit(system: Any, num_bytes: int) -> dict[str, float]:
    """The keyword argument that ends a call of fsspec which writes `num_bytes`, if the store has stopped answering.

    Requests that read have limits of their own. One that writes has none: S3's asks for leave to send first
    (`Expect: 100-continue`), and aiohttp waits for that without end.
    """
    if not getattr(system, "async_impl", False):
        return {}
    return {"timeout": _WRITE_SECONDS + num_bytes / _SLOWEST_BYTES_PER_SECOND}


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn the errors of fsspec's packages into the classes of this file.

    FileNotFoundError stays as it is. So do errors that can only come from a bug, such as TypeError.
    """
    try:
        yield
    except (FileNotFoundError, StoreError, StoreRefusedError, UserError):
        raise
    except Exception as error:
        if type(error).__name__ == "FSTimeoutError":  # of `write_limit`
            raise StoreError("the store has stopped answering") from error
        if type(error).__module__ == "builtins" and not isinstance(error, OSError):
            raise
        raise _class_of(error)(reason(error)) from error


def version_of(info: dict[str, Any]) -> str:
    """What changes whenever the object is written, from fsspec's `info`; empty if the store does not tell."""
    for key in ("ETag", "etag", "generation", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified"):
        if info.get(key):
            return str(info[key]).strip('"')
    return str(info.get("updated") or info.get("created") or "")


def _options(scheme: str, retries: bool) -> dict[str, Any]:
    if scheme in ("file", "local"):
        return {"auto_mkdir": True}
    if scheme not in ("s3", "s3a"):
        return {}
    if retries:
        return {"max_concurrency": 4}  # parts of 50 MiB in memory
    from fsspec.config import conf

    given = conf.get(scheme, {}).get("config_kwargs") or {}
    return {"config_kwargs": {"retries": {"total_max_attempts": 1}, **given}}


def _class_of(error: BaseException) -> type[OSError]:
    chain = list(_chain(error))
    if any(map(_is_out_of_reach, chain)):
        return OutOfReachError
    if isinstance(error, TimeoutError):  # S3 reports some of its own with a status of 400
        return StoreError
    status = _status(error) or 0
    denied = 300 <= status < 500 and status not in _MAY_PASS
    if (
        denied
        or isinstance(error, PermissionError)
        or any(_BAD_SETTINGS.fullmatch(type(one).__name__) for one in chain)
    ):
        return StoreRefusedError
    return StoreError


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_out_of_reach(error: BaseException) -> bool:
    refused = isinstance(error, ConnectionRefusedError)
    return refused or any(_OUT_OF_REACH.fullmatch(base.__name__) for base in type(error).__mro__)


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of s3fs, aiohttp, gcsfs, requests or Azure's packages."""
    of_botocore = getattr(error.__cause__ or error, "response", None)
    if isinstance(of_botocore, dict):
        return of_botocore.get("ResponseMetadata", {}).get("HTTPStatusCode")
    response = getattr(error, "response", None)
    for holder, name in ((error, "status"), (error, "code"), (error, "status_code"), (response, "status_code")):
        if isinstance(status := getattr(holder, name, None), int):
            return status
    return None
