"""A few MB of real English text as shards in RefinedWeb's schema, without a download.

The text ships with Python: the language reference of `help()` and the docstrings of the standard library. The same
Python version gives the same shards. The corpus is for trying things out; it is far too small to train a useful model.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import os
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from megastruct.errors import Problem, UserError
from megastruct.files import write_atomically

SCHEMA = pa.schema(
    [
        ("content", pa.string()),
        ("url", pa.string()),
        ("timestamp", pa.timestamp("s")),
        ("dump", pa.string()),
        ("segment", pa.string()),
        ("image_urls", pa.list_(pa.list_(pa.string()))),
    ]
)
RECORD_NAME = ".corpus.json"  # hidden, so that it is not read as a shard
MIN_DOCUMENT_CHARACTERS = 300
MAX_DOCUMENT_CHARACTERS = 4000
# Third-party code, and tests, whose docstrings contain little English.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
STATEMENT_FIELDS = ("body", "orelse", "handlers", "finalbody", "cases")  # of nodes of `ast` that hold statements


class SampleCorpus(NamedTuple):
    """The size of a corpus that was written."""

    num_documents: int
    num_characters: int


def write_sample_corpus(output: Path, num_shards: int, shard_format: str) -> SampleCorpus | None:
    """Write `num_shards` files in `shard_format` (parquet or jsonl) to `output`; None if they exist already.

    Raises:
        UserError: the folder holds other files, or this Python ships without the text.
    """
    settings = {"num_shards": num_shards, "format": shard_format, "python": platform.python_version()}
    if _is_done(output, settings):
        return None
    documents = collect_documents()
    output.mkdir(parents=True, exist_ok=True)
    files = {}
    for index in range(num_shards):
        name = f"shard-{index:05d}-of-{num_shards:05d}.{shard_format}"
        content = _shard_content(documents[index::num_shards], shard_format)
        write_atomically(output / name, content)
        files[name] = len(content)
    record = {"settings": settings, "files": files}
    write_atomically(output / RECORD_NAME, json.dumps(record, indent=1).encode() + b"\n")
    return SampleCorpus(len(documents), sum(len(text) for _, text in documents))


def collect_documents() -> list[tuple[str, str]]:
    """(url, text) of all documents, without small ones and copies, in an order that mixes topics and modules.

    Raises:
        UserError: this Python ships without the text.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    unique: dict[str, str] = {}
    for source in (_topic_documents(), _docstring_documents(library)):
        for url, text in source:
            if len(text) >= MIN_DOCUMENT_CHARACTERS:
                unique.setdefault(text, url)
    if not unique:
        found = f"this Python has neither help topics nor the sources of its standard library ({library})"
        raise UserError(Problem("--output", found, "run it with another Python, or use your own text"))
    documents = [(url, text) for text, url in unique.items()]
    return sorted(documents, key=lambda document: hashlib.sha256(document[1].encode()).digest())


def _topic_documents() -> Iterator[tuple[str, str]]:
    """(url, text) of every page of `help()`."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"https://docs.python.org/3/topics/{name}", topics[name].strip()


def _docstring_documents(library: Path) -> Iterator[tuple[str, str]]:
    """(url, text) of the docstrings of every module under `library`, cut between docstrings into pages."""
    paths = []
    for folder, folders, names in os.walk(library):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    for path in tqdm(sorted(paths), desc="modules", unit="", disable=not sys.stderr.isatty()):
        module = path.relative_to(library).with_suffix("").as_posix().removesuffix("/__init__").replace("/", ".")
        page, number = "", 0
        for docstring in [*_docstrings(path), None]:
            if page and (docstring is None or len(page) + len(docstring) > MAX_DOCUMENT_CHARACTERS):
                yield f"https://docs.python.org/3/library/{module}.html?page={number}", page
                page, number = "", number + 1
            page = f"{page}\n\n{docstring}" if page else docstring or ""


def _docstrings(path: Path) -> list[str]:
    """Docstrings of the module, its classes and functions, in source order; nothing is imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escape sequences in the sources
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates that are not valid Python
        return []
    nodes = list(_documented(tree))
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = []
    for node in nodes:
        if text := ast.get_docstring(node, clean=False):
            text = inspect.cleandoc(text)
            found.append(text if isinstance(node, ast.Module) else f"{node.name}: {text}")
    return found


def _documented(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The module, its classes and functions, level by level. Expressions, most of a tree, contain none."""
    level: list[ast.AST] = [tree]
    while level:
        for node in level:
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield node
        level = [child for node in level for field in STATEMENT_FIELDS for child in getattr(node, field, ())]


def _shard_content(documents: list[tuple[str, str]], shard_format: str) -> bytes:
    """The bytes of one shard's file."""
    columns = {
        "content": [text for _, text in documents],
        "url": [url for url, _ in documents],
        "timestamp": [datetime(2024, 1, 1)] * len(documents),
        "dump": [f"python-{platform.python_version()}"] * len(documents),
        "segment": ["docstrings"] * len(documents),
        "image_urls": [[] for _ in documents],
    }
    table = pa.table(columns, schema=SCHEMA)
    if shard_format == "jsonl":
        rows = table.to_pylist()
        return "".join(json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in rows).encode()
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd", row_group_size=1000)
    return file.getvalue()


def _is_done(output: Path, settings: dict[str, Any]) -> bool:
    """Whether `output` holds the shards of these settings.

    Raises:
        UserError: it holds other files.
    """
    if output.exists() and not output.is_dir():
        raise UserError(Problem("--output", f"{output} is not a folder", "give a folder, which need not exist"))
    if not output.exists() or not any(output.iterdir()):
        return False
    suggestion = "give an empty folder, or one that does not exist"
    try:
        record = json.loads((output / RECORD_NAME).read_text())
        old_settings, files = record["settings"], record["files"]
    except OSError:
        names = [path.name for path in output.iterdir()]
        # Only the leftovers of a killed run of this tool may be overwritten.
        if all(name.startswith("shard-") for name in names):
            return False
        raise UserError(Problem("--output", f"{output} holds other files", suggestion)) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(Problem("--output", f"{output / RECORD_NAME} is damaged", suggestion)) from None
    if old_settings != settings:
        raise UserError(Problem("--output", f"{output} was made with {old_settings}, not with {settings}", suggestion))
    return all((output / name).is_file() and (output / name).stat().st_size == size for name, size in files.items())
