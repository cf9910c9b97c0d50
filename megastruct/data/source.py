"""Where text comes from: a path or a hub name becomes a sorted list of shards, each checked when it is opened."""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from megastruct.errors import Problem, UserError

JSONL_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
MANIFEST_NAME = "manifest.json"  # of token shards
_MAX_PROBLEMS_SHOWN = 20
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_COLUMN_SUGGESTION = "name the column that holds the text (data.text_column, or --text-column of the tools)"


@dataclass(frozen=True)
class TextShard:
    """One file of documents."""

    uri: str  # absolute path, or hf://datasets/...
    name: str  # the uri without what all shards of a source share; sorting by it does not depend on the location
    num_bytes: int

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    @property
    def is_parquet(self) -> bool:
        return self.uri.endswith(".parquet")


def find_shards(path: str, where: str, base_folder: Path | None = None) -> list[TextShard]:
    """All shards of a folder (searched to the bottom), a glob, a single file or a Hugging Face dataset name.

    A folder's JSON lines are taken only if it holds no parquet file: beside parquet they are notes about it.
    Relative paths start at `base_folder` (the current directory without it). Sorted by name.

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
        return _hub_shards(path, where)
    raise UserError(Problem(where, f"{local} does not exist", "give a folder, a glob or a file of text shards"))


def _local_shards(files: list[Path], root: Path, where: str, what: str) -> list[TextShard]:
    chosen = [file for file in files if file.name.endswith(".parquet")]
    chosen = chosen or [file for file in files if file.name.endswith(JSONL_ENDINGS)]
    if not chosen:
        found = f"{what} has no text shard among its {len(files)} files"
        raise UserError(Problem(where, found, f"give files that end with .parquet, {', '.join(JSONL_ENDINGS)}"))
    shards = [TextShard(str(file), file.relative_to(root).as_posix(), file.stat().st_size) for file in chosen]
    return sorted(shards, key=lambda shard: shard.name)


def _hub_shards(name: str, where: str) -> list[TextShard]:
    from huggingface_hub import HfFileSystem  # slow to import, and few runs read from the hub

    root = f"datasets/{name}"
    try:
        files = HfFileSystem().find(root, detail=True)
    except Exception as error:  # the library's network errors have no common base class
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        found = f"{name} is no local path, and as a Hugging Face dataset it cannot be listed ({reason})"
        suggestion = "correct the path; or check the dataset's name and the network; or download it and give the folder"
        raise UserError(Problem(where, found, suggestion)) from None
    shards = [
        TextShard(f"hf://{file}", str(PurePosixPath(file).relative_to(root)), info.get("size") or 0)
        for file, info in files.items()
        if file.endswith(".parquet")
    ]
    if not shards:
        raise UserError(Problem(where, f"the Hugging Face dataset {name} has no parquet file", "give another dataset"))
    return sorted(shards, key=lambda shard: shard.name)


def check_shards(shards: list[TextShard], text_column: str) -> None:
    """Check that every local shard can be opened and has the text column; of remote shards only the first.

    Parquet is judged by its footer, JSON lines by the first objects: what lies behind is found when it is read.

    Raises:
        UserError: naming every bad file.
    """
    to_check = [shard for shard in shards if shard.is_local] or shards[:1]
    with ThreadPoolExecutor(16) as pool:  # thousands of footers on a network file system
        problems = [problem for problem in pool.map(lambda shard: _check(shard, text_column), to_check) if problem]
    if problems:
        shown = problems[:_MAX_PROBLEMS_SHOWN]
        if len(problems) > len(shown):
            shown.append(Problem("", f"and {len(problems) - len(shown)} more files"))
        raise UserError(shown, f"{len(problems)} of {len(shards)} text shards cannot be used:")


def _check(shard: TextShard, text_column: str) -> Problem | None:
    if shard.is_local and shard.num_bytes == 0:
        return Problem(shard.uri, "the file is empty (0 bytes)", "remove it, or download it again")
    try:
        return _check_parquet(shard, text_column) if shard.is_parquet else _check_jsonl(shard, text_column)
    except UserError as error:
        return error.problems[0]
    except READ_ERRORS as error:
        return unreadable(shard, error).problems[0]


def _check_parquet(shard: TextShard, text_column: str) -> Problem | None:
    import fsspec

    with fsspec.open(shard.uri, "rb") as file:
        schema = pq.ParquetFile(file).schema_arrow
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


def numbered_lines(shard: TextShard, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """(line number from 0, bytes) of every line of a JSON-lines shard that is not blank, from line `start` on."""
    import fsspec

    with fsspec.open(shard.uri, "rb", compression="infer") as file:
        for line_number, line in enumerate(file):
            if line_number >= start and line.strip():
                yield line_number, line.removeprefix(b"\xef\xbb\xbf") if line_number == 0 else line


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
    """Raises UserError if a local shard has another size than when it was found, OSError if it is gone."""
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
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    gone = isinstance(error, FileNotFoundError)
    found = "the file is gone" if gone else f"the file cannot be read, it is damaged or cut short ({reason})"
    return UserError(Problem(shard.uri, found, "remove it, or download it again"))
