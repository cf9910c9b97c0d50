"""Datasets of the hub, read over HTTP from one on this machine, by the programs as a user starts them."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from local_hub import LocalHub
from marks import soak
from megastruct.data.preparation.prepare import prepare
from megastruct.data.tokens.manifest import load_manifest
from test_prepare import ROOT, arguments_for, contents
from test_readers import open_tiny
from tiny_data import SEED, SEQ_LENGTH, VALIDATION_FRACTION, make_texts, open_kind, write_parquet

NAME = "org/name"


@pytest.fixture
def hub():
    with LocalHub() as hub:
        yield hub


@pytest.fixture
def files(text_folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in text_folder.iterdir()}


@pytest.fixture
def few(files) -> dict[str, bytes]:
    return {name: files[name] for name in ("shard-0.parquet", "shard-1.parquet", "shard-2.parquet")}


def run(hub, tmp_path, *command, **environment) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf_home"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=kept | own | environment, capture_output=True, text=True, timeout=120)


def prepare_from(hub, tmp_path, tokenizer_path, *more, name=NAME, **environment) -> subprocess.CompletedProcess:
    arguments = arguments_for(name, tmp_path / "out", tokenizer_path, *more)
    return run(hub, tmp_path, ROOT / "tools" / "prepare_data.py", *arguments, **environment)


def refused(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("try:") == 1, result.stderr
    return result.stderr


# Preparing --------------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_same_files_in_a_folder(hub, files, token_folder, tokenizer_path, tmp_path):
    """Listed once for all workers, in pages; the token of a user goes to the hub, and not where it redirects to."""
    hub.commit(NAME, files | {"README.md": b"# notes", ".hidden.parquet": b""})
    hub.page_size = 3
    result = prepare_from(hub, tmp_path, tokenizer_path, "--workers", "2", HF_TOKEN="hf_secret")
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "out") == contents(token_folder)
    listing = [request for request in hub.requests if request.path.startswith("/api/datasets/")]
    assert len(listing) == 1 + 3
    assert {request.authorization for request in hub.requests if "/datasets/" in request.path} == {"Bearer hf_secret"}
    assert {request.authorization for request in hub.requests if request.is_bytes} == {None}


def test_a_branch_is_read_at_its_commit(hub, files, text_folder, tokenizer_path, tmp_path):
    hub.commit(NAME, files)
    part = {f"sub/{name}": files[name] for name in sorted(files)[:2]}
    commit = hub.commit(NAME, part, "feature/x")
    hub.fail("tree", lambda: hub.commit(NAME, files, "feature/x"), 1)  # a push behind the back of the run
    result = prepare_from(hub, tmp_path, tokenizer_path, name=f"{NAME}@feature/x")
    assert result.returncode == 0, result.stderr
    assert commit in result.stdout
    (tmp_path / "text" / "sub").mkdir(parents=True)
    for name, content in part.items():
        (tmp_path / "text" / name).write_bytes(content)
    options = {"validation_fraction": VALIDATION_FRACTION, "max_shard_tokens": 1000}
    prepare(str(tmp_path / "text"), tmp_path / "local", str(tokenizer_path), **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_json_lines_of_the_hub(hub, tokenizer_path, tmp_path):
    lines = "".join(json.dumps({"content": text}) + "\n" for shard in range(2) for text in make_texts(shard)).encode()
    for name, content in {"a.jsonl": lines, "b/c d#1%20.json.gz": gzip.compress(lines, mtime=0)}.items():
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / name).write_bytes(content)
    hub.commit(NAME, {"a.jsonl": lines, "b/c d#1%20.json.gz": gzip.compress(lines, mtime=0)})
    assert prepare_from(hub, tmp_path, tokenizer_path).returncode == 0
    options = {"validation_fraction": VALIDATION_FRACTION, "max_shard_tokens": 1000}
    manifest = prepare(str(tmp_path / "text"), tmp_path / "local", str(tokenizer_path), **options)
    assert load_manifest(tmp_path / "out") == manifest


def test_other_columns_are_not_downloaded(hub, tokenizer_path, tmp_path):
    rng = np.random.default_rng(0)
    table = pa.table({"content": [f"river stone {i}" for i in range(2000)], "image": [rng.bytes(4000)] * 2000})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=500, use_dictionary=False, compression="none")
    hub.commit(NAME, {"a.parquet": (tmp_path / "a.parquet").read_bytes()})
    result = prepare_from(hub, tmp_path, tokenizer_path)
    assert result.returncode == 0, result.stderr
    assert hub.bytes_of("a.parquet") < 0.05 * (tmp_path / "a.parquet").stat().st_size
    manifest = load_manifest(tmp_path / "out")
    assert manifest.totals.train.num_documents + manifest.totals.validation.num_documents == 2000


# Finds places one after the other and prints the names of their shards, or the message; and what the user is told.
FIND = """
import json, sys
from pathlib import Path
from megastruct.data.sources.choice import Choice
from megastruct.data.sources.place import Place
from megastruct.errors import UserError
found = []
for path, *choice, include in json.loads(sys.argv[1]):
    try:
        text = Place(path, "--input", Choice(*choice, tuple(include))).find(1.0, Path(sys.argv[2]))
        found.append([[shard.name for shard in text.shards], text.shards[0].uri, text.lines()])
    except UserError as error:
        found.append(str(error))
print(json.dumps(found))
"""
CARD = """---
configs:
- {config_name: en, data_files: [{split: train, path: en/t*.jsonl}, {split: validation, path: en/v*.jsonl}]}
- {config_name: de, data_files: de/*.jsonl}
---
"""


def find_at(hub, tmp_path, *places) -> list:
    given = [[path, config, split, include] for path, config, split, include in places]
    result = run(hub, tmp_path, "-c", FIND, json.dumps(given), tmp_path / "cache")
    assert result.returncode == 0 and not result.stderr, result.stderr
    return json.loads(result.stdout)


def test_configurations_splits_and_parts_of_a_dataset(hub, tmp_path):
    names = ["en/t0.jsonl", "en/t1.jsonl", "en/v0.jsonl", "de/a.jsonl", "raw/x/train.jsonl", "raw/x/test.jsonl"]
    files = {name: json.dumps({"text": name}).encode() for name in names}
    commit = hub.commit(NAME, files | {"README.md": CARD.encode()})
    files = hub.commit(NAME, files, "plain")
    places = [
        (NAME, "en", "train", []),
        (NAME, "de", None, []),
        (NAME, None, None, ["en/t*"]),
        (f"{NAME}/raw/x", None, "test", []),
        (f"hf://datasets/{NAME}@plain/en", None, None, []),
        (f"hf://datasets/{NAME}/en/v*.jsonl", None, None, []),
        (f"{NAME}/de/a.jsonl", None, None, []),
        (NAME, None, None, []),
        (NAME, "en", None, []),
        (f"{NAME}/raw", None, None, []),
        (f"{NAME}/nowhere", None, None, []),
        (f"hf://datasets/{NAME}/r*", None, None, []),
    ]
    found = find_at(hub, tmp_path, *places)
    assert [each[0] for each in found[:7]] == [
        ["en/t0.jsonl", "en/t1.jsonl"],
        ["de/a.jsonl"],
        ["en/t0.jsonl", "en/t1.jsonl"],
        ["test.jsonl"],
        ["t0.jsonl", "t1.jsonl", "v0.jsonl"],
        ["v0.jsonl"],
        ["a.jsonl"],
    ]
    assert found[3][1] == f"hf://datasets/{NAME}@{commit}/raw/x/test.jsonl"
    line, *not_read = found[0][2]
    assert f"at commit {commit}: 2 shards" in line and "configuration en, split train" in line and "'text'" in line
    assert any("of another configuration or split: 4 files" in line for line in not_read)
    assert "2 configurations" in found[7] and "en, de" in found[7] and "--config en" in found[7]
    assert "train (2 files), validation (1 file)" in found[8] and "--split train" in found[8]
    assert "train (1 file), test (1 file)" in found[9] and "has no nowhere among its 7 files" in found[10]
    assert "names 1 folder and no file (raw)" in found[11]

    hub.requests.clear()
    assert find_at(hub, tmp_path, *places[:2]) == found[:2]  # from the cache, with what the user is told
    assert not hub.requests


# Training ---------------------------------------------------------------------------------------------------------

# Opens the data as a rank does and prints its samples, the cursor behind them and how many broken documents it met.
TRAIN = """
import json, sys
from pathlib import Path
import numpy as np
from megastruct.config.data import DataConfig
from megastruct.data import open_data
from megastruct.data.options import DataOptions
from megastruct.errors import user_errors_exit
keys, values, start, cursor, num_batches = json.loads(sys.argv[1])
with user_errors_exit():
    data = open_data(DataOptions(DataConfig(kind="text", **keys), cache_folder=Path(sys.argv[2]), **values))
    reader = data.train_reader(4, 4, 0, 1, cursor and np.array(cursor), start)
    rows = [next(reader).ids.tolist() for _ in range(num_batches)]
    held_out = [batch.ids.tolist() for batch in data.validation_batches(4, 4, 0, 1)]
    print(json.dumps([rows, reader.cursor().tolist(), held_out, data.describe()]))
"""


def train_from(
    hub, tmp_path, tokenizer_path, num_batches, start=0, cursor=None, options=None, hub_commits=(), **environment
):
    keys = {"path": NAME, "tokenizer": str(tokenizer_path), "validation_fraction": VALIDATION_FRACTION}
    keys |= {"num_streams": 1, "num_workers": 0, **(options or {})}
    values = {"seq_length": SEQ_LENGTH, "vocab_size": 512, "seed": SEED, "hub_commits": hub_commits}
    given = json.dumps([keys, values, start, cursor, num_batches])
    return run(hub, tmp_path, "-c", TRAIN, given, tmp_path / "cache", **environment)


def batches_of(reader, num_batches):
    return [next(reader).ids.tolist() for _ in range(num_batches)]


def test_training_goes_on_where_it_was_and_downloads_what_it_needs(hub, tokenizer_path, tmp_path):
    """The samples of a folder; resumed in the middle, at the commit that the run began with, after another push."""
    text = tmp_path / "text"
    text.mkdir()
    for shard in range(3):
        table = pa.table({"content": [text for text in make_texts(1 + shard) if text] * 60})
        path = text / f"shard-{shard}.parquet"
        pq.write_table(table, path, row_group_size=200, use_dictionary=False, compression="none")
    old = hub.commit(NAME, {path.name: path.read_bytes() for path in text.iterdir()})
    local = open_tiny("text", text, tokenizer_path, num_streams=1).train_reader(4, 4, 0, 1)

    first = train_from(hub, tmp_path, tokenizer_path, 3, options={"num_workers": 1})
    assert first.returncode == 0, first.stderr
    rows, _, held_out, described = json.loads(first.stdout)
    assert rows == batches_of(local, 3) and described["hub_commits"] == [old]
    batches = open_tiny("text", text, tokenizer_path).validation_batches(4, 4, 0, 1)
    assert held_out == [batch.ids.tolist() for batch in batches]

    num_batches = 3
    while local.cursor()[0, 1] < 2 or local.cursor()[0, 2] < 2200:  # far in the last shard
        next(local)
        num_batches += 1
    cursor = local.cursor().tolist()
    hub.commit(NAME, {"other.parquet": b"other"})
    hub.requests.clear()
    second = train_from(hub, tmp_path, tokenizer_path, 3, 4 * num_batches, cursor, options={"num_workers": 1})
    assert second.returncode == 0, second.stderr
    rows, end, _, described = json.loads(second.stdout)
    assert rows == batches_of(local, 3) and end == local.cursor().tolist() and described["hub_commits"] == [old]
    read = {request.path for request in hub.requests if request.is_bytes}
    assert len(read) == 1 and not any("/api/datasets/" in request.path for request in hub.requests)
    name = read.pop()
    assert hub.bytes_of(name) < 0.6 * (text / name).stat().st_size  # its footer, and row groups from the cursor on


@pytest.mark.soak
def test_a_mixture_and_processes_that_read_it_list_the_hub_once(hub, files, text_folder, tokenizer_path, tmp_path):
    hub.commit(NAME, files)
    hub.commit("org/other", files)
    paths = [{"path": NAME, "weight": 0.5}, {"path": "org/other", "weight": 0.5}]
    result = train_from(hub, tmp_path, tokenizer_path, 6, options={"path": paths, "num_workers": 2, "num_streams": 2})
    assert result.returncode == 0, result.stderr
    folders = [(str(text_folder), 0.5), (str(text_folder), 0.5)]
    options = {"seq_length": SEQ_LENGTH, "vocab_size": 512, "seed": SEED, "validation_fraction": VALIDATION_FRACTION}
    local = open_kind("text", folders, tokenizer_path, num_streams=2, **options).train_reader(4, 4, 0, 1)
    assert json.loads(result.stdout)[0] == batches_of(local, 6)
    assert sum(request.path.startswith("/api/datasets/") for request in hub.requests) == 2 * 2


# Faults -----------------------------------------------------------------------------------------------------------


def test_what_fails_for_a_while_is_tried_again_and_nothing_is_lost(hub, files, token_folder, tokenizer_path, tmp_path):
    hub.commit(NAME, files)
    hub.fail("/api/datasets/", 503, 1)
    hub.fail("/resolve/", 502, 1)  # while the first shard is checked
    hub.fail("^shard-2.parquet", "cut", 1)
    hub.fail("^shard-4.parquet", "reset", 1)
    result = prepare_from(hub, tmp_path, tokenizer_path)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "out") == contents(token_folder)
    assert result.stderr.count("trying again") == 4 and "Traceback" not in result.stderr


def test_a_connection_that_is_cut_while_training_goes_on_in_the_middle(hub, tokenizer_path, tmp_path):
    """The failure comes behind documents that were read already: they come neither twice nor never."""
    (tmp_path / "text").mkdir()
    path = write_parquet(tmp_path / "text" / "a.parquet", [t for t in make_texts(0) if t] * 20, row_group_size=500)
    hub.commit(NAME, {"a.parquet": path.read_bytes()})
    counted = []

    def cut_some():
        counted.append(1)
        return "cut" if len(counted) in (6, 8) else None

    hub.fail("^a.parquet", cut_some)
    result = train_from(hub, tmp_path, tokenizer_path, 200)
    assert result.returncode == 0, result.stderr
    local = open_tiny("text", tmp_path / "text", tokenizer_path, num_streams=1).train_reader(4, 4, 0, 1)
    rows, cursor, *_ = json.loads(result.stdout)
    assert rows == batches_of(local, 200) and cursor == local.cursor().tolist()
    assert result.stderr.count("trying again") == 2 and max(index for index, *_ in cursor) == 0


@pytest.mark.parametrize(
    "name, pattern, status, message",
    [
        ("org/nothing", "^$", 401, r"--input: org/nothing is not a local path, .*rejects it.*401"),
        (f"{NAME}@nowhere", "^$", 404, r"--input: org/name@nowhere is not .*rejects it.*RevisionNotFound"),
        soak(NAME, "/api/datasets/", 403, r"--input: org/name is not .*rejects it.*403"),
        soak(NAME, "/resolve/.*shard-0", 403, r"@[0-9a-f]{40}/shard-0.parquet: .*rejects the request.*403"),
        (NAME, "/resolve/.*shard-1", 401, r"@[0-9a-f]{40}/shard-1.parquet: .*rejects the request.*401"),
        soak(NAME, "^shard-1", 404, r"@[0-9a-f]{40}/shard-1.parquet: .*rejects the request.*404"),
    ],
)
def test_what_the_hub_refuses_is_said_at_once(hub, few, tokenizer_path, tmp_path, name, pattern, status, message):
    hub.commit(NAME, few)
    hub.fail(pattern, status)
    error = refused(prepare_from(hub, tmp_path, tokenizer_path, name=name))
    assert re.search(message, error) and "trying again" not in error and "hf auth login" in error


@pytest.mark.parametrize("what", [soak("empty"), "without text"])
def test_a_dataset_without_text_is_a_message(hub, tokenizer_path, tmp_path, what):
    hub.commit(NAME, {} if what == "empty" else {"README.md": b"#", ".a.parquet": b"", "image.png": b""})
    error = refused(prepare_from(hub, tmp_path, tokenizer_path))
    assert "--input: the Hugging Face dataset org/name has no text shard" in error and ".parquet" in error


def test_a_server_without_ranges_is_said_at_once(hub, few, tokenizer_path, tmp_path):
    hub.commit(NAME, {"a.parquet": few["shard-0.parquet"] + few["shard-1.parquet"]})
    hub.has_ranges = False
    error = refused(prepare_from(hub, tmp_path, tokenizer_path))
    assert "a.parquet: the server ignores byte ranges" in error and "trying again" not in error


def test_a_server_that_is_asked_too_often_is_left_alone_for_as_long_as_it_says(hub, few, tokenizer_path, tmp_path):
    hub.commit(NAME, few)
    hub.fail("/resolve/", 429, 1)
    result = prepare_from(hub, tmp_path, tokenizer_path)
    assert result.returncode == 0, result.stderr
    assert "trying again in 2.0 s" in result.stderr


@pytest.mark.soak
def test_without_its_cache_a_run_goes_on_with_the_commit_that_it_is_known_by(hub, few, tokenizer_path, tmp_path):
    """The folder of the cache is made with those above it, so that whoever starts first is the only one to list."""
    old = hub.commit(NAME, few)
    for folder, hub_commits in (("new/a", []), ("new/b", [old])):
        result = train_from(hub, tmp_path / folder, tokenizer_path, 1, hub_commits=hub_commits)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)[3]["hub_commits"] == [old]
        assert list((tmp_path / folder / "cache").glob("hub-*"))
        hub.commit(NAME, {"other.parquet": b"other"})


def test_damage_is_said_at_once(hub, few, tokenizer_path, tmp_path):
    content = bytearray(few["shard-1.parquet"])
    content[4 : len(content) // 3] = bytes(len(content) // 3 - 4)
    hub.commit(NAME, few | {"shard-1.parquet": bytes(content), "shard-2.parquet": few["shard-2.parquet"][:-50]})
    result = prepare_from(hub, tmp_path, tokenizer_path)
    assert result.returncode == 2 and result.stderr.count("damaged") == 2 and "Traceback" not in result.stderr
    assert "shard-1.parquet" in result.stderr and "shard-2.parquet" in result.stderr
    assert "trying again" not in result.stderr


def test_a_shard_that_has_another_size_than_was_listed_is_refused(hub, few, tokenizer_path, tmp_path):
    commit = hub.commit(NAME, few)
    longer = few["shard-1.parquet"] + b"more"
    hub.blobs[hashlib.sha256(longer).hexdigest()] = ("shard-1.parquet", longer)
    hub.fail("/tree/", lambda: hub.commits[commit].update({"shard-1.parquet": longer}), 1)
    error = refused(prepare_from(hub, tmp_path, tokenizer_path))
    assert f"shard-1.parquet: has {len(longer)} bytes, but it had {len(longer) - 4}" in error


@pytest.mark.soak
def test_a_preparation_that_goes_on_takes_shards_anew_that_were_pushed(hub, few, tokenizer_path, tmp_path):
    """The same names and sizes, other contents: the record of what is finished does not count."""
    hub.commit(NAME, few)
    hub.fail("^shard-2", 404)
    refused(prepare_from(hub, tmp_path, tokenizer_path))
    hub.recover()
    changed = few["shard-0.parquet"].replace(b"river", b"stone")
    assert changed != few["shard-0.parquet"]
    hub.commit(NAME, few | {"shard-0.parquet": changed})
    hub.requests.clear()
    result = prepare_from(hub, tmp_path, tokenizer_path)
    assert result.returncode == 0 and "1 of 3 shards are done" in result.stdout, result.stderr
    assert {request.path for request in hub.requests if request.is_bytes} == {"shard-0.parquet", "shard-2.parquet"}


def test_a_hub_that_goes_down_is_named_when_patience_ends(hub, few, tokenizer_path, tmp_path):
    """The shard that was finished is kept."""
    del few["shard-2.parquet"]
    hub.commit(NAME, few)
    hub.fail("/resolve/.*shard-1", hub.go_down)
    error = refused(prepare_from(hub, tmp_path, tokenizer_path, "--patience-seconds", "0.6"))
    assert re.search(r"@[0-9a-f]{40}/shard-1.parquet: could not be read for 0.6 s \(last error: ConnectError", error)
    assert "trying again" in error and "shard-0" not in error
    assert (tmp_path / "out" / "progress" / "00000.json").is_file()


def test_a_hub_that_is_down_is_said_at_once_because_the_name_may_be_a_wrong_path(hub, tokenizer_path, tmp_path):
    hub.go_down()
    error = refused(prepare_from(hub, tmp_path, tokenizer_path, name="data/texts"))
    assert "--input: data/texts is not a local path" in error and "ConnectError" in error
    assert "trying again" not in error


@pytest.mark.parametrize("pattern, named", [soak("/tree/", "org/name"), ("^shard-1", "shard-1.parquet")])
def test_a_hub_that_hangs_is_named_when_patience_ends(hub, few, tokenizer_path, tmp_path, pattern, named):
    hub.commit(NAME, few)
    hub.fail(pattern, "hang")
    start = time.monotonic()
    options = {"HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    error = refused(prepare_from(hub, tmp_path, tokenizer_path, "--patience-seconds", "0.2", **options))
    assert re.search(rf"{named}: could not be (listed|read) for 0.2 s \(last error: ReadTimeout", error)
    assert time.monotonic() - start < 60  # without the option: minutes


@pytest.mark.soak
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_training_whose_hub_goes_down_is_ended_with_the_name(hub, files, tokenizer_path, tmp_path, num_workers):
    hub.commit(NAME, files)
    hub.fail("^shard-2", hub.go_down)
    options = {"num_workers": num_workers, "patience_seconds": 1.0}
    error = refused(train_from(hub, tmp_path, tokenizer_path, 400, options=options))
    assert "could not be read for 1 s" in error and "hf://datasets/org/name@" in error


# The libraries ----------------------------------------------------------------------------------------------------

LIBRARIES = """
import json, sys
import datasets
from huggingface_hub import HfFileSystem
from megastruct.data.sources.reading import read_patiently
from megastruct.data.sources.find import find_shards
shards = find_shards(sys.argv[1], "--input")
ours = [d.content.decode() for shard in shards for batch in read_patiently(shard, "content") for d in batch]
files = {"train": [shard.uri for shard in shards]}
stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
theirs = [row["content"] or "" for row in stream]
found = HfFileSystem().find("datasets/" + sys.argv[1], detail=True)
sizes = {name.rpartition("/")[2]: info["size"] for name, info in found.items()}
print(json.dumps([ours, theirs, sizes, {shard.name: shard.num_bytes for shard in shards}]))
"""


def test_datasets_and_the_file_system_of_the_hub_see_the_same(hub, few, tmp_path):
    """The hub on this machine is one for the libraries too, and what they find and stream is what we do."""
    hub.commit(NAME, few)
    hub.page_size = 2
    result = run(hub, tmp_path, "-c", LIBRARIES, NAME)
    assert result.returncode == 0, result.stderr
    ours, theirs, found, listed = json.loads(result.stdout)
    assert [text for text in ours if text] == [text for text in theirs if text.strip()] and len(ours) == len(theirs)
    assert found == listed
