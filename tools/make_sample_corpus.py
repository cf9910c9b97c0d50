#!/usr/bin/env python
"""Write a few MB of real English text as shards in RefinedWeb's schema, without a download.

    python tools/make_sample_corpus.py --output corpus/

The text comes with every Python: the language reference of `help()` and the docstrings of the standard library. The
same Python version gives the same shards. It is for trying things out: it is far too little to train a model on.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import io
import json
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout that is not installed

from megastruct.errors import Problem, UserError, user_errors_exit
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
RECORD_NAME = ".corpus.json"  # hidden, so that it is not taken for a shard
MIN_DOCUMENT_CHARACTERS = 300
MAX_DOCUMENT_CHARACTERS = 4000
# Third-party code, and the tests, whose docstrings are hardly English.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}


def topic_documents() -> Iterator[tuple[str, str]]:
    """(url, text) of every page of `help()`."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"https://docs.python.org/3/topics/{name}", topics[name].strip()


def docstring_documents(library: Path) -> Iterator[tuple[str, str]]:
    """(url, text) of the docstrings of every module under `library`, cut between docstrings into pages."""
    paths = [path for path in library.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(library).parts)]
    for path in tqdm(sorted(paths), desc="modules", unit="", disable=not sys.stderr.isatty()):
        module = path.relative_to(library).with_suffix("").as_posix().removesuffix("/__init__").replace("/", ".")
        page, number = "", 0
        for docstring in [*docstrings(path), None]:
            if page and (docstring is None or len(page) + len(docstring) > MAX_DOCUMENT_CHARACTERS):
                yield f"https://docs.python.org/3/library/{module}.html?page={number}", page
                page, number = "", number + 1
            page = f"{page}\n\n{docstring}" if page else docstring or ""


def docstrings(path: Path) -> list[str]:
    """Docstrings of the module and of its classes and functions in the order of the source; nothing is imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates that are not Python yet
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = []
    for node in nodes:
        if text := ast.get_docstring(node, clean=False):
            text = inspect.cleandoc(text)
            found.append(text if isinstance(node, ast.Module) else f"{node.name}: {text}")
    return found


def collect_documents() -> list[tuple[str, str]]:
    """All documents, without small ones and copies, in an order in which topics and modules are mixed."""
    library = Path(sysconfig.get_paths()["stdlib"])
    unique: dict[str, str] = {}
    for source in (topic_documents(), docstring_documents(library)):
        for url, text in source:
            if len(text) >= MIN_DOCUMENT_CHARACTERS:
                unique.setdefault(text, url)
    if not unique:
        found = f"this Python carries neither help topics nor the sources of its standard library ({library})"
        raise UserError(Problem("--output", found, "run it with another Python, or use text of your own"))
    documents = [(url, text) for text, url in unique.items()]
    return sorted(documents, key=lambda document: hashlib.sha256(document[1].encode()).digest())


def shard_content(documents: list[tuple[str, str]], shard_format: str) -> bytes:
    """One shard's file."""
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


def is_done(output: Path, settings: dict) -> bool:
    """Whether `output` holds these shards.

    Raises:
        UserError: it holds something else.
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
        # Only what a run of this tool that was killed leaves behind may be written over.
        if all(name.startswith("shard-") for name in names):
            return False
        raise UserError(Problem("--output", f"{output} holds other files", suggestion)) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(Problem("--output", f"{output / RECORD_NAME} is damaged", suggestion)) from None
    if old_settings != settings:
        raise UserError(Problem("--output", f"{output} was made with {old_settings}, now it is {settings}", suggestion))
    return all((output / name).is_file() and (output / name).stat().st_size == size for name, size in files.items())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder for the shards")
    parser.add_argument("--num-shards", type=int, default=4, help="number of files (default: %(default)s)")
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    with user_errors_exit():
        if arguments.num_shards < 1:
            raise UserError(Problem("--num-shards", f"{arguments.num_shards} is less than 1", "--num-shards 4"))
        settings = {
            "num_shards": arguments.num_shards,
            "format": arguments.format,
            "python": platform.python_version(),
        }
        if is_done(arguments.output, settings):
            print(f"already done: {arguments.output}")
            return
        documents = collect_documents()
        arguments.output.mkdir(parents=True, exist_ok=True)
        files = {}
        for index in range(arguments.num_shards):
            name = f"shard-{index:05d}-of-{arguments.num_shards:05d}.{arguments.format}"
            content = shard_content(documents[index :: arguments.num_shards], arguments.format)
            write_atomically(arguments.output / name, content)
            files[name] = len(content)
        record = {"settings": settings, "files": files}
        write_atomically(arguments.output / RECORD_NAME, json.dumps(record, indent=1).encode() + b"\n")
        num_characters = sum(len(text) for _, text in documents)
        print(
            f"done: {arguments.output}: {len(documents):,} documents, {num_characters:,} characters, "
            f"{arguments.num_shards} {arguments.format} shards"
        )


if __name__ == "__main__":
    main()
