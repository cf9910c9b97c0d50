"""Where text comes from: a path or a hub name becomes a sorted list of shards, each checked when it is opened."""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from megastruct.data.cache import cached_json, key_of
from megastruct.data.sources import hub
from megastruct.data.sources.patience import DEFAULT_PATIENCE_SECONDS, patiently, reason
from megastruct.errors import Problem, UserError

JSONL_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
MANIFEST_NAME = "manifest.json"  # of token shards
_MAX_PROBLEMS_SHOWN = 20
_HUB_BUFFER_BYTES = 4 << 20  # a request takes a tenth of a second or more
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_COLUMN_SUGGESTION = "name the column that holds the text (data.text_column, or --text-column of the tools)"


@dataclass(frozen=True)
class TextShard:
    """One file of documents."""

    uri: str  # absolute path, or hf://datasets/ORG/NAME@COMMIT/...
    name: str  # the uri without what all shards of a source share; sorting by it does not depend on the location
    num_bytes: int
    content_id: str = ""  # of the hub's: a hash of the contents

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    @property
    def is_parquet(self) -> bool:
        return self.uri.endswith(".parquet")


def find_shards(
    path: str,
    where: str,
    base_folder: Path | None = None,
    patience_seconds: float = DEFAULT_PATIENCE_SECONDS,
    cache_folder: Path | None = None,
    commit: str | None = None,
) -> list[TextShard]:
    """All shards of a folder (searched to the bottom), a glob, a single file or a Hugging Face dataset name.

    JSON lines are taken only where there is no parquet file: beside parquet they are notes about it. Relative paths
    start at `base_folder` (the current directory without it). Sorted by name. What a dataset name stood for is kept
    in `cache_folder`; where it is not there any more, `commit` says which one a run began with.

    Raises:
        UserError: nothing is there, no file has a known ending, or the hub cannot be reached; `where` is its key.
    """
    local = (base_folder or Path()).absolute() / Path(path).expanduser()
    if local.is_dir():
        if (local / MANIFEST_NAME).is_file():
            found = f"{local} holds token shards ({MANIFEST_NAME})"
            raise UserError(Problem(where, found, "train with data.kind=tokens, or give the text they were made from"))
        files = [Path(folder) / name for folder, _, names in os.walk(local) for name in names if name[0] != "."]
        return _local_shards(files, local, where, f"the folder {local}")
    if local.is_file():
        return _local_shards([local], local.parent, where, str(local))
    if glob.has_magic(path):
        files = [Path(name) for name in glob.glob(str(local), recursive=True) if os.path.isfile(name)]
        root = os.path.commonpath([file.parent for file in files]) if files else local
        return _local_shards(files, Path(root), where, f"the pattern {local}")
    if _HUB_NAME.fullmatch(path):
        found = cached_json(
            cache_folder,
            f"hub-{key_of(path)}",
            lambda: [astuple(shard) for shard in _hub_shards(hub.at_commit(path, commit), where, patience_seconds)],
        )
        return [TextShard(*values) for values in found]
    raise UserError(Problem(where, f"{local} does not exist", "give a folder, a glob or a file of text shards"))


def _local_shards(files: list[Path], root: Path, where: str, what: str) -> list[TextShard]:
    names = _names_of_text([file.relative_to(root).as_posix() for file in files], where, what)
    return [TextShard(str(root / name), name, (root / name).stat().st_size) for name in names]


def _names_of_text(names: list[str], where: str, what: str) -> list[str]:
    chosen = [name for name in names if name.endswith(".parquet")]
    chosen = chosen or [name for name in names if name.endswith(JSONL_ENDINGS)]
    if not chosen:
        found = f"{what} has no text shard among its {len(names)} files"
        raise UserError(Problem(where, found, f"give files that end with .parquet, {', '.join(JSONL_ENDINGS)}"))
    return sorted(chosen)


def _hub_shards(name: str, where: str, patience_seconds: float) -> list[TextShard]:
    """A hub that is out of reach is said at once, because `name` may be a wrong path; one that fails is waited for."""
    may_pass = lambda error: hub.of_the_network(error) and not hub.out_of_reach(error)  # noqa: E731
    try:
        commit, files = patiently(lambda: hub.list_dataset(name), name, patience_seconds, may_pass, "list of its files")
    except UserError as error:
        raise UserError([Problem(where, str(problem)) for problem in error.problems]) from None
    except Exception as error:  # the libraries below have no common class for what a network does
        if hub.refused(error):
            found = f"{name} is no local path, and the Hugging Face hub refuses it as a dataset ({reason(error)})"
            suggestion = "correct the path, or the dataset's name or revision; log in (hf auth login) if it is private"
        else:
            found = f"{name} is no local path, and as a Hugging Face dataset it cannot be listed ({reason(error)})"
            suggestion = "correct the path; or check the network; or download the dataset and give the folder"
        raise UserError(Problem(where, found, suggestion)) from None
    shown = {file.path: file for file in files if not file.path.rpartition("/")[2].startswith(".")}
    chosen = _names_of_text(list(shown), where, f"the Hugging Face dataset {name}")
    return [TextShard(hub.uri_of(name, commit, path), *shown[path]) for path in chosen]


def check_shards(shards: list[TextShard], text_column: str, patience_seconds: float = DEFAULT_PATIENCE_SECONDS) -> None:
    """Check that every local shard can be opened and has the text column; of remote shards only the first.

    Parquet is judged by its footer, JSON lines by the first objects: what lies behind is found when it is read.

    Raises:
        UserError: naming every bad file.
    """
    to_check = [shard for shard in shards if shard.is_local or not shard.num_bytes] or shards[:1]
    with ThreadPoolExecutor(16) as pool:  # thousands of footers on a network file system
        found = pool.map(lambda shard: _check(shard, text_column, patience_seconds), to_check)
        problems = [problem for problem in found if problem]
    if problems:
        shown = problems[:_MAX_PROBLEMS_SHOWN]
        if len(problems) > len(shown):
            shown.append(Problem("", f"and {len(problems) - len(shown)} more files"))
        raise UserError(shown, f"{len(problems)} of {len(shards)} text shards cannot be used:")


def _check(shard: TextShard, text_column: str, patience_seconds: float) -> Problem | None:
    if shard.num_bytes == 0:
        return Problem(shard.uri, "the file is empty (0 bytes)", "remove it, or download it again")
    check = _check_parquet if shard.is_parquet else _check_jsonl
    may_pass = lambda error: not shard.is_local and hub.of_the_network(error)  # noqa: E731
    try:
        return patiently(lambda: check(shard, text_column), shard.uri, patience_seconds, may_pass)
    except UserError as error:
        return error.problems[0]
    except READ_ERRORS as error:
        return unreadable(shard, error).problems[0]


def _check_parquet(shard: TextShard, text_column: str) -> Problem | None:
    with open_parquet(shard) as file:
        schema = file.schema_arrow
    if text_column not in schema.names:
        return missing_column(shard, text_column, schema.names)
    column_type = schema.field(text_column).type
    if pa.types.is_dictionary(column_type):
        column_type = column_type.value_type
    kinds = ("string", "large_string", "string_view", "binary", "large_binary", "null")
    if str(column_type) not in kinds:
        return Problem(shard.uri, f"column {text_column!r} is of type {column_type}, not text", _COLUMN_SUGGESTION)
    return None


def _check_jsonl(shard: TextShard, text_column: str, num_objects: int = 100) -> Problem | None:
    """A single bad line is a broken document; a file whose first lines are all bad is something else."""
    names: dict[str, None] = {}
    first_mistake: Problem | None = None
    num_good = 0
    for _, (line_number, line) in zip(range(num_objects), numbered_lines(shard), strict=False):
        try:
            values = parse_line(line)
        except ValueError as error:
            found = f"none of its first lines is a JSON object (line {line_number + 1}: {error})"
            suggestion = "give one JSON object per line, or download the file again"
            first_mistake = first_mistake or Problem(shard.uri, found, suggestion)
            continue
        if text_column in values:
            return None
        num_good += 1
        names |= dict.fromkeys(values)
    if names:
        return missing_column(shard, text_column, list(names))
    return None if num_good else first_mistake


def open_parquet(shard: TextShard, buffer_bytes: int = 1 << 20) -> pq.ParquetFile:
    """Read through a buffer for each column, so that what is asked for is all that is read."""
    if shard.is_local:
        return pq.ParquetFile(shard.uri, buffer_size=buffer_bytes, pre_buffer=False)
    return pq.ParquetFile(_hub_bytes(shard), buffer_size=max(buffer_bytes, _HUB_BUFFER_BYTES), pre_buffer=False)


def _hub_bytes(shard: TextShard) -> hub.HubBytes:
    return hub.HubBytes(shard.uri, shard.num_bytes)


def numbered_lines(shard: TextShard, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """(line number from 0, bytes) of every line of a JSON-lines shard that is not blank, from line `start` on."""
    with _open_lines(shard) as file, gzip.open(file) if shard.uri.endswith(".gz") else nullcontext(file) as lines:
        for line_number, line in enumerate(lines):
            if line_number >= start and line.strip():
                yield line_number, line.removeprefix(b"\xef\xbb\xbf") if line_number == 0 else line


def _open_lines(shard: TextShard) -> BinaryIO:
    return open(shard.uri, "rb") if shard.is_local else io.BufferedReader(_hub_bytes(shard), _HUB_BUFFER_BYTES)


def parse_line(line: bytes) -> dict:
    """One object of a JSON-lines shard.

    Raises:
        ValueError: the line is not a JSON object; UnicodeDecodeError, which is one, if it is not UTF-8.
    """
    text = line.decode("utf-8")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"a JSON {type(values).__name__}, not an object")
    return values


def check_unchanged(shard: TextShard) -> None:
    """Raises UserError if a local shard has another size than when it was found, OSError if it is gone.

    The hub's are read at a commit, which does not change.
    """
    num_bytes = os.stat(shard.uri).st_size if shard.is_local else shard.num_bytes
    if num_bytes != shard.num_bytes:
        found = f"has {num_bytes} bytes, it had {shard.num_bytes} when this run began: it was changed meanwhile"
        raise UserError(Problem(shard.uri, found, "let it be written to its end, then start again"))


def missing_column(shard: TextShard, text_column: str, names: list[str]) -> Problem:
    found = f"column {text_column!r} is missing; the columns are: {', '.join(names)}"
    return Problem(shard.uri, found, _COLUMN_SUGGESTION)


# What reading a damaged or unreachable file can raise; anything else is a bug of ours and keeps its traceback.
READ_ERRORS = (OSError, EOFError, zlib.error, gzip.BadGzipFile, pa.ArrowException)


def unreadable(shard: TextShard, error: BaseException) -> UserError:
    """The user's message for one of READ_ERRORS."""
    if not shard.is_local and hub.refused(error):
        suggestion = "check its name, log in (hf auth login) and ask for access if it is gated; or download it"
        return UserError(Problem(shard.uri, f"cannot be read: the hub refuses it ({reason(error)})", suggestion))
    if hub.offline(error):
        found = "cannot be read: HF_HUB_OFFLINE is set"
        return UserError(Problem(shard.uri, found, "HF_HUB_OFFLINE=0; or download it and give the folder"))
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    gone = isinstance(error, FileNotFoundError)
    found = "the file is gone" if gone else f"the file cannot be read, it is damaged or cut short ({text})"
    return UserError(Problem(shard.uri, found, "remove it, or download it again"))
