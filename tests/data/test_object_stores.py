"""Shards of text in an object store, read over HTTP from one on this machine."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest

from local_s3 import LocalS3, set_environment
from megastruct.commands.prepare import main
from megastruct.data.preparation.prepare import prepare
from megastruct.data.sources.find import find_shards
from megastruct.data.sources.fsspec_address import StoreError, StoreRefusedError, open_address, store_errors
from megastruct.data.sources.reading import read_patiently
from megastruct.data.tokens.fetch import fetch_folder
from megastruct.errors import UserError
from test_prepare import ROOT, arguments_for, contents
from tiny_data import SEED, SEQ_LENGTH, VALIDATION_FRACTION, open_kind

LINES = b"".join(json.dumps({"content": f"document {i} " + 500 * "x"}).encode() + b"\n" for i in range(1000))


@pytest.fixture(scope="module")
def server():
    with LocalS3() as server:
        yield server


@pytest.fixture(autouse=True)
def _environment(server, monkeypatch):
    for key, value in server.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("megastruct.data.sources.patience._FIRST_PAUSE_SECONDS", 0.05)
    yield
    server.recover()
    server.requests.clear()


@pytest.fixture
def bucket(server, text_folder) -> str:
    return server.bucket({f"corpus/{path.name}": path.read_bytes() for path in text_folder.iterdir()})


def only_shard(server, content: bytes = LINES, key: str = "a.jsonl"):
    bucket = server.bucket({key: content})
    [shard] = find_shards(f"s3://{bucket}", "data.path")
    return bucket, shard


def read(shard, start: int = 0, patience_seconds: float = 20.0) -> list[str]:
    parts = read_patiently(shard, "content", start, patience_seconds)
    return [document.text for part in parts for document in part]


def problem_of(action) -> str:
    with pytest.raises(UserError) as raised:
        action()
    assert len(raised.value.problems) == 1
    return str(raised.value)


def test_tokens_are_those_of_the_same_files_in_a_folder(server, bucket, token_folder, tokenizer_path, tmp_path):
    """With worker processes, by the program; what is no shard is left alone."""
    server.put(bucket, "corpus/README.md", b"# notes")
    server.put(bucket, "corpus/.hidden.parquet", b"")
    server.put(bucket, "corpus-2/other.parquet", b"")
    arguments = arguments_for(f"s3://{bucket}/corpus/", tmp_path / "out", tokenizer_path, "--workers", "2")
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *map(str, arguments)]
    result = subprocess.run(command, env=set_environment(server), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "out") == contents(token_folder)


@pytest.mark.parametrize("pattern", ["corpus/shard-[01].parquet", "corpus/shard-0.parquet", "corp*/shard-?.parquet"])
def test_a_pattern_or_an_object_means_what_it_means_in_a_folder(bucket, text_folder, pattern):
    found = find_shards(f"s3://{bucket}/{pattern}", "data.path")
    expected = find_shards(
        str(text_folder.parent / pattern.replace("corpus", text_folder.name).replace("corp*", text_folder.name)),
        "data.path",
    )
    assert [(shard.name, shard.num_bytes) for shard in found] == [(one.name, one.num_bytes) for one in expected]
    assert all(shard.uri.startswith(f"s3://{bucket}/corpus/") and shard.content_id for shard in found)


def test_hidden_objects_and_folders_of_a_pattern_are_named(server):
    bucket = server.bucket(dict.fromkeys(("c/.a.jsonl", "c/b.jsonl", "c/d.jsonl/part-0.jsonl"), LINES))
    notes = {place: list[str]() for place in ("c", "c/*", "c/d*/*")}
    found = {place: find_shards(f"s3://{bucket}/{place}", "data.path", notes=notes[place]) for place in notes}
    names = {place: [shard.name for shard in shards] for place, shards in found.items()}
    assert names == {"c": ["b.jsonl", "d.jsonl/part-0.jsonl"], "c/*": ["b.jsonl"], "c/d*/*": ["part-0.jsonl"]}
    hidden = "not read, hidden: 1 file (.a.jsonl)"
    folder = f"not read, named by the pattern, which should name files: 1 folder ({bucket}/c/d.jsonl)"
    assert notes == {"c": [hidden], "c/*": [folder, hidden], "c/d*/*": []}


def test_training_resumes_at_the_same_sample(server, bucket, text_folder, tokenizer_path):
    """The samples are those of the folder, with connections that fail on the way; a cursor continues them."""
    sizes = {"seq_length": SEQ_LENGTH, "vocab_size": 330, "seed": SEED, "validation_fraction": VALIDATION_FRACTION}
    local = open_kind("text", str(text_folder), tokenizer_path, **sizes)
    remote = open_kind("text", f"s3://{bucket}/corpus", tokenizer_path, patience_seconds=20, **sizes)
    assert remote.describe() == local.describe()
    expected = [batch.ids for batch, _ in zip(local.train_reader(4, 4, 0, 1), range(12), strict=False)]
    server.fail("GET .*shard", 503, 3)
    server.fail("GET .*shard", "cut", 2)
    reader = remote.train_reader(4, 4, 0, 1)
    found = [next(reader).ids for _ in range(5)]
    cursor = reader.cursor()
    reader = remote.train_reader(4, 4, 0, 1, cursor, 5 * 4)
    found += [next(reader).ids for _ in range(7)]
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("failure", [500, 503, "cut", "reset"])
def test_a_failure_that_passes_is_retried(server, failure, capsys):
    _, shard = only_shard(server)
    server.fail("GET .*a.jsonl", failure, 2)
    assert len(read(shard)) == 1000
    # No retries beside those of the project, but for one of HTTP's own when a connection that was kept is closed.
    assert capsys.readouterr().err.count("trying again") == (1 if failure == "reset" else 2)


def test_a_server_that_goes_down_in_the_middle_and_comes_back(server, monkeypatch):
    """Reading continues after the last document that arrived, with requests of ranges only."""
    monkeypatch.setattr("megastruct.data.sources.object_files.ObjectFiles.request_bytes", 50_000)
    _, shard = only_shard(server)
    reading = read_patiently(shard, "content", 0, 20.0)
    texts = [document.text for document in next(reading)]
    server.go_down()
    threading.Timer(0.4, server.come_up).start()
    texts += [document.text for part in reading for document in part]
    assert texts == [json.loads(line)["content"] for line in LINES.splitlines()]
    assert all(request.range for request in server.requests if request.method == "GET" and "a.jsonl" in request.path)


def test_a_server_that_stays_down_is_named(server):
    _, shard = only_shard(server)
    server.fail("(GET|HEAD) .*a.jsonl", 503)
    assert "could not be read for 0.3 s" in problem_of(lambda: read(shard, patience_seconds=0.3))


def test_resuming_a_parquet_shard_downloads_what_follows(server, text_folder):
    """The footer and the row groups from the place on, of the text column only."""
    content = (text_folder / "shard-0.parquet").read_bytes()
    _, shard = only_shard(server, content, "a.parquet")
    assert read(shard, 100) == read(find_shards(str(text_folder), "")[0], 100)


@pytest.mark.parametrize("replacement", [LINES[::-1], LINES[:-600], LINES + LINES], ids=["same size", "less", "more"])
def test_an_object_that_is_replaced_while_it_is_read_is_refused(server, monkeypatch, replacement):
    monkeypatch.setattr("megastruct.data.sources.object_files.ObjectFiles.request_bytes", 50_000)
    bucket, shard = only_shard(server)
    reading = read_patiently(shard, "content", 0, 20.0)
    next(reading)
    server.put(bucket, "a.jsonl", replacement)
    assert "was changed" in problem_of(lambda: list(reading))
    assert "was changed" in problem_of(lambda: read(shard))


def test_an_object_that_is_removed_is_named(server):
    bucket, shard = only_shard(server)
    server.client.delete_object(Bucket=bucket, Key="a.jsonl")
    assert "the file is gone" in problem_of(lambda: read(shard))


def test_damage_is_told_from_failure(server):
    _, shard = only_shard(server, gzip.compress(LINES)[:-1000], "a.jsonl.gz")
    assert "damaged or cut short" in problem_of(lambda: read(shard))


def test_a_denied_request_is_not_retried(server):
    _, shard = only_shard(server)
    server.fail("(GET|HEAD) .*a.jsonl", 403)
    message = problem_of(lambda: read(shard))
    assert "rejects the request" in message and "credentials" in message


def test_an_interrupted_preparation_reads_replaced_objects_again(server, bucket, text_folder, tokenizer_path, tmp_path):
    server.fail("GET .*shard-5", 403)
    options = {"validation_fraction": VALIDATION_FRACTION, "max_shard_tokens": 1000}
    source = f"s3://{bucket}/corpus"
    with pytest.raises(UserError):
        prepare(source, tmp_path / "out", str(tokenizer_path), **options)
    server.recover()
    server.put(bucket, "corpus/shard-1.parquet", (text_folder / "shard-2.parquet").read_bytes())
    manifest = prepare(source, tmp_path / "out", str(tokenizer_path), **options)
    assert manifest == prepare(source, tmp_path / "afresh", str(tokenizer_path), **options)


# Mistakes ---------------------------------------------------------------------------------------------------------


def test_mistakes_in_an_address_are_one_message(server, bucket, monkeypatch):
    found = {
        f"s3://{bucket}/nothing": "nothing is there",
        "s3://no-such-bucket/x": "nothing is there",
        "s3://": "names no bucket",
        "gs://bucket/x": "pip install 'megastruct[gs]'",
        "weird://bucket/x": "Protocol not known",
    }
    for address, message in found.items():
        assert message in problem_of(lambda address=address: find_shards(address, "data.path")), address
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3")
    assert "pip install 'megastruct[s3]'" in problem_of(lambda: find_shards(f"s3://{bucket}", "data.path"))


def test_an_unreachable_store_is_named_at_once(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert "cannot be reached" in problem_of(lambda: find_shards("s3://bucket/x", "data.path", 300))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert "credentials" in problem_of(lambda: find_shards("s3://bucket/x", "data.path", 300))
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_other_file_systems_of_fsspec(text_folder, token_folder, tokenizer_path, tmp_path):
    """A file system without a network, by the same way."""
    options = {"validation_fraction": VALIDATION_FRACTION, "max_shard_tokens": 1000}
    prepare(f"file://{text_folder}", tmp_path / "out", str(tokenizer_path), **options)
    assert contents(tmp_path / "out") == contents(token_folder)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError("x"), StoreError),
        (TimeoutError("x"), StoreError),
        (OSError(5, "x"), StoreError),
        (PermissionError("x"), StoreRefusedError),
        (FileNotFoundError("x"), FileNotFoundError),
        (TypeError("a bug"), TypeError),
        (type("HttpError", (Exception,), {"code": 429})("x"), StoreError),
        (type("HttpError", (Exception,), {"code": 502})("x"), StoreError),
        (type("HttpError", (Exception,), {"code": 401})("x"), StoreRefusedError),
        (type("ClientResponseError", (Exception,), {"status": 404})("x"), StoreRefusedError),
        (type("DefaultCredentialsError", (Exception,), {})("x"), StoreRefusedError),
    ],
)
def test_which_errors_may_pass(error, expected):
    type(error).__module__ == "builtins" or setattr(type(error), "__module__", "package")
    with pytest.raises(expected) as raised, store_errors():
        raise error
    assert raised.type is expected or expected is StoreError


def test_no_request_is_made_to_open_an_address(server):
    open_address("s3://bucket/x", "data.path")
    assert not server.requests


def test_the_local_path_of_an_address_is_not_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        find_shards("s3://no-such-bucket/x", "data.path")
    assert not list(Path.cwd().iterdir())


# Token shards -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tokens(server, token_folder) -> str:
    """The address of a copy of the token shards."""
    names = [path.relative_to(token_folder).as_posix() for path in token_folder.rglob("*") if path.is_file()]
    return f"s3://{server.bucket({f't/{name}': (token_folder / name).read_bytes() for name in names})}/t"


def test_token_shards_are_copied_once_and_checked(server, tokens, token_folder, tmp_path, capsys):
    sizes = {"seq_length": SEQ_LENGTH, "vocab_size": 330, "seed": SEED}
    server.fail("GET .*bin", 503, 2)
    opened = [
        open_kind("tokens", tokens, None, token_cache=str(tmp_path), patience_seconds=20, **sizes) for _ in range(2)
    ]
    local = open_kind("tokens", str(token_folder), None, **sizes)
    assert opened[0].describe() == opened[1].describe() == local.describe()
    assert "copying" in capsys.readouterr().err
    read = {request.path for request in server.requests if request.method == "GET" and request.path.endswith(".bin")}
    assert len(read) == len(list(token_folder.rglob("*.bin")))
    assert sum(request.path in read and request.method == "GET" for request in server.requests) == len(read) + 2
    [copy] = tmp_path.iterdir()
    assert contents(copy) == contents(token_folder)
    batch, expected = (next(data.train_reader(4, 4, 0, 1)).ids for data in (opened[1], local))
    assert np.array_equal(batch, expected)


def test_a_damaged_token_file_is_named_and_an_interrupted_copy_continues(server, tokens, token_folder, tmp_path):
    bucket = tokens.split("/")[2]
    content = (token_folder / "train" / "00000-000.bin").read_bytes()
    server.put(bucket, "t/train/00000-000.bin", content[::-1])
    assert "SHA-256" in problem_of(lambda: fetch_folder(tokens, "data.path", str(tmp_path)))
    server.put(bucket, "t/train/00000-000.bin", content)
    server.requests.clear()
    assert contents(fetch_folder(tokens, "data.path", str(tmp_path))) == contents(token_folder)
    assert sum(".bin" in request.path and request.method == "GET" for request in server.requests) == 1
    assert "has no manifest.json" in problem_of(lambda: fetch_folder(f"{tokens}/train", "data.path", str(tmp_path)))


def test_an_output_cannot_be_an_address(bucket, tokenizer_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(list(map(str, arguments_for(f"s3://{bucket}/corpus", "s3://bucket/out", tokenizer_path))))
    assert "--output: s3:/bucket/out is an address" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
