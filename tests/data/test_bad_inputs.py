"""Every mistake of a user's is one message that names the key or the file, and never a traceback."""

import gzip
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megastruct.data import open_tokenizer
from megastruct.data.sources.find import find_shards
from megastruct.data.sources.reading import read_patiently
from megastruct.data.sources.shards import TextShard
from megastruct.data.split import is_validation
from megastruct.errors import UserError
from tiny_data import invalid_utf8, open_kind, train_model, write_parquet

GOOD = ["some words that are here", "and a few more of them"] * 40


def open_text(folder, tokenizer_path, **options):
    defaults = {"seq_length": 8, "vocab_size": 512, "seed": 0, "validation_fraction": 0.0}
    return open_kind("text", str(folder), tokenizer_path, **{**defaults, **options})


def open_tokens(folder, tokenizer_path=None, **options):
    defaults = {"seq_length": 8, "vocab_size": 512, "seed": 0}
    return open_kind("tokens", str(folder), tokenizer_path, **{**defaults, **options})


def message_of(function, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    return str(caught.value)


# Files ------------------------------------------------------------------------------------------------------------


def damage_middle(path):
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 3] = bytes(len(content) // 3 - 4)
    path.write_bytes(content)


def test_all_broken_parquet_files_are_named_at_once(tmp_path, tokenizer_path):
    good = write_parquet(tmp_path / "good.parquet", GOOD)
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:-100])
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "other.parquet").write_bytes(b"not parquet at all")
    write_parquet(tmp_path / "column.parquet", GOOD, column="text")
    pq.write_table(pa.table({"content": [1, 2, 3]}), tmp_path / "numbers.parquet")
    message = message_of(open_text, tmp_path, tokenizer_path)
    for name in ("cut", "empty", "other", "column", "numbers"):
        assert f"{name}.parquet" in message
    assert "good.parquet" not in message
    assert "0 bytes" in message and "the columns are: text, url" in message and "int64" in message


def test_damaged_pages_are_a_message_when_they_are_read(tmp_path, tokenizer_path):
    rng = np.random.default_rng(0)
    texts = ["".join(chr(97 + c) for c in rng.integers(0, 26, 200)) for _ in range(500)]
    damage_middle(write_parquet(tmp_path / "a.parquet", texts))
    reader = open_text(tmp_path, tokenizer_path).train_reader(1, 1, 0, 1)
    assert "a.parquet" in message_of(lambda: [next(reader) for _ in range(20_000)])


def test_jsonl_files(tmp_path, tokenizer_path):
    lines = [json.dumps({"content": text, "url": "u"}) for text in GOOD]
    content = "\n".join(lines).encode()
    (tmp_path / "good.jsonl").write_bytes(content)
    (tmp_path / "good2.jsonl.gz").write_bytes(gzip.compress(content))
    next(open_text(tmp_path, tokenizer_path).train_reader(2, 2, 0, 1))

    (tmp_path / "array.json").write_text(json.dumps([{"content": "x"}], indent=1))
    (tmp_path / "column.jsonl").write_text('{"text": "x", "id": 3}\n')
    (tmp_path / "notjson.jsonl").write_text("hello\n")
    (tmp_path / "notgzip.jsonl.gz").write_bytes(content)
    message = message_of(open_text, tmp_path, tokenizer_path)
    for name in ("array.json", "column.jsonl", "notjson.jsonl", "notgzip.jsonl.gz"):
        assert name in message
    assert "good" not in message and "the columns are: text, id" in message


def test_a_jsonl_that_is_cut_short_loses_its_last_document(tmp_path, tokenizer_path):
    content = "\n".join(json.dumps({"content": text}) for text in GOOD).encode()
    (tmp_path / "a.jsonl").write_bytes(content[:-5])
    documents = read(tmp_path / "a.jsonl")
    assert [document.broken for document in documents] == [None] * (len(GOOD) - 1) + ["unparsable"]
    reader = open_text(tmp_path, tokenizer_path).train_reader(1, 1, 0, 1)
    while reader.cursor()[0, 0] < 2:
        next(reader)
    assert reader.skipped_documents == 2


def test_a_gzip_that_is_cut_short_is_a_message_when_it_is_read(tmp_path, tokenizer_path):
    rng = np.random.default_rng(0)
    texts = ["".join(chr(97 + c) for c in rng.integers(0, 26, 200)) for _ in range(500)]
    content = "\n".join(json.dumps({"content": text}) for text in texts).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content)[:-2000])
    reader = open_text(tmp_path, tokenizer_path).train_reader(1, 1, 0, 1)
    message = message_of(lambda: [next(reader) for _ in range(20_000)])
    assert "a.jsonl.gz" in message and "cut short" in message


def test_a_shard_that_changes_is_a_message_when_it_is_opened(tmp_path, tokenizer_path):
    write_parquet(tmp_path / "a.parquet", GOOD)
    data = open_text(tmp_path, tokenizer_path)
    write_parquet(tmp_path / "a.parquet", GOOD[1:])
    message = message_of(next, data.train_reader(1, 1, 0, 1))
    assert "a.parquet" in message and "changed" in message
    (tmp_path / "a.parquet").unlink()
    message = message_of(next, data.train_reader(1, 1, 0, 1))
    assert "a.parquet" in message and "gone" in message


@pytest.mark.parametrize("name", ["nothing/here", "no*thing", "a/b/c", "file.bin"])
def test_paths_that_lead_nowhere(tmp_path, tokenizer_path, monkeypatch, name):
    (tmp_path / "file.bin").write_text("x")
    monkeypatch.chdir(tmp_path)
    message = message_of(open_text, name, tokenizer_path)
    assert "data.path" in message and name.split("/")[-1] in message


def test_folder_without_shards_and_folder_of_tokens(tmp_path, tokenizer_path, token_folder):
    assert "no text shard" in message_of(open_text, tmp_path, tokenizer_path)
    assert "data.kind=tokens" in message_of(open_text, token_folder, tokenizer_path)
    write_parquet(tmp_path / "a.parquet", GOOD)
    assert "data.kind=text" in message_of(open_tokens, tmp_path)


def test_sources(tmp_path, monkeypatch):
    """Folders are searched to the bottom; hidden files and odd names are handled."""
    folder = tmp_path / "od[d] na*me"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.parquet", "sub/a.parquet", ".hidden.parquet"):
        write_parquet(folder / name, GOOD)
    shards = find_shards(str(folder), "data.path")
    assert [shard.name for shard in shards] == ["b.parquet", "sub/a.parquet"]
    monkeypatch.chdir(tmp_path)
    assert find_shards("od[[]d] na[*]me/**/*.parquet", "data.path") == shards
    assert [shard.name for shard in find_shards(str(folder / "b.parquet"), "data.path")] == ["b.parquet"]
    documents = [document for batch in read_patiently(shards[0], "content") for document in batch]
    assert [document.text for document in documents] == GOOD


# Documents --------------------------------------------------------------------------------------------------------


def read(path, start=0):
    shard = TextShard(str(path), path.name, path.stat().st_size)
    return [document for batch in read_patiently(shard, "content", start) for document in batch]


def test_broken_documents_in_parquet_are_skipped_one_by_one(tmp_path):
    column = invalid_utf8(b"good", b"\xff\xfe", None, b"", b" \n", "ok é".encode())
    write_parquet(tmp_path / "a.parquet", column)
    documents = read(tmp_path / "a.parquet")
    assert [document.broken for document in documents] == [None, "undecodable", "null", "empty", "empty", None]
    assert [document.text for document in documents if not document.broken] == ["good", "ok é"]


@pytest.mark.parametrize("compressed", [False, True])
def test_broken_documents_in_jsonl_are_skipped_one_by_one(tmp_path, compressed):
    lines = [
        b'\xef\xbb\xbf{"content": "good"}',
        b'{"content": "\xff"}',
        b'{"content": null}',
        b"",
        b'{"url": "x"}',
        b'{"content": 3}\r',
        b'{"content": "\\ud800"}',
        b'{"content": ""}',
        b'["content"]',
        b'{"content": "cut',
        '{"content": "é\\u2028\u2028"}'.encode(),
    ]
    path = tmp_path / ("a.jsonl.gz" if compressed else "a.jsonl")
    content = b"\n".join(lines)
    path.write_bytes(gzip.compress(content) if compressed else content)
    reasons = [
        None,
        "undecodable",
        "null",
        "null",
        "not_a_string",
        "undecodable",
        "empty",
        "unparsable",
        "unparsable",
        None,
    ]
    documents = read(path)
    assert [document.broken for document in documents] == reasons
    assert [document.index for document in documents] == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]  # lines; the blank one is none
    assert documents[-1].text == "é\u2028\u2028"
    assert read(path, start=5) == documents[4:]


@pytest.mark.parametrize("start", [0, 1, 24, 25, 63, 64, 65, 149, 150, 999])
def test_reading_from_the_middle(text_folder, start):
    path = text_folder / "shard-0.parquet"
    assert read(path, start) == read(path)[start:]


def test_memory_does_not_grow_with_the_row_group(tmp_path):
    """The first documents of one large row group are there before the rest of it was read."""
    write_parquet(tmp_path / "a.parquet", ["word " * 2000] * 5000, row_group_size=10**9)
    shard = TextShard(str(tmp_path / "a.parquet"), "a.parquet", (tmp_path / "a.parquet").stat().st_size)
    before = pa.total_allocated_bytes()
    documents = read_patiently(shard, "content")
    next(documents)
    assert pa.total_allocated_bytes() - before < 20e6 < 5000 * 10_000


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_column_types_that_hold_text(tmp_path, tokenizer_path, type_):
    write_parquet(
        tmp_path / "a.parquet",
        pa.array(GOOD, type_) if not pa.types.is_dictionary(type_) else pa.array(GOOD).dictionary_encode(),
    )
    open_text(tmp_path, tokenizer_path)
    assert [document.text for document in read(tmp_path / "a.parquet")] == GOOD


def test_stream_without_documents_ends_with_a_message(tmp_path, tokenizer_path):
    write_parquet(tmp_path / "a.parquet", [None, "", "  "])
    write_parquet(tmp_path / "b.parquet", [])
    reader = open_text(tmp_path, tokenizer_path).train_reader(1, 1, 0, 1)
    message = message_of(next, reader)
    assert "no document to train on" in message and ".parquet" in message


# Tokenizer, sizes, cursors ----------------------------------------------------------------------------------------


def test_tokenizer_files(tmp_path, tokenizer_path):
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "empty.model").write_bytes(b"")
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    train_model(tmp_path / "no_eos.model", eos_id=-1)
    for name, what in (
        ("missing.model", "does not exist"),
        ("empty.model", "0 bytes"),
        ("tokenizer.json", "is no tokenizer.json (it has no 'vocab')"),
        ("no_eos.model", "end-of-sentence"),
    ):
        message = message_of(open_text, tmp_path, tmp_path / name)
        assert "data.tokenizer" in message and name in message and what in message
        assert "a.parquet" in message  # all problems at once
        assert name in message_of(open_tokenizer, tmp_path / name)
    assert "data.tokenizer" in message_of(open_kind, "text", "x", None, seq_length=8, vocab_size=512, seed=0)


def test_vocabulary_of_the_model_is_too_small(text_folder, token_folder, tokenizer_path):
    for message in (
        message_of(open_text, text_folder, tokenizer_path, vocab_size=329),
        message_of(open_tokens, token_folder, vocab_size=329),
    ):
        assert "model.vocab_size" in message and "330" in message
    open_text(text_folder, tokenizer_path, vocab_size=330)


def test_too_many_streams_and_foreign_cursors(text_folder, token_folder, tokenizer_path):
    assert "data.num_streams" in message_of(open_text, text_folder, tokenizer_path, num_streams=7)
    data = open_text(text_folder, tokenizer_path, num_streams=2)
    cursor = open_text(text_folder, tokenizer_path, num_streams=4).train_reader(1, 1, 0, 1).cursor()
    assert "data.num_streams" in message_of(data.train_reader, 4, 1, 0, 1, cursor, 0)
    cursor = data.train_reader(4, 1, 0, 1).cursor()
    cursor[1, 1] = 3
    assert "data.path" in message_of(data.train_reader, 4, 1, 0, 1, cursor, 0)
    cursor[1] = -1
    with pytest.raises(ValueError, match="merge"):
        data.train_reader(4, 1, 0, 1, cursor, 0)
    with pytest.raises(ValueError, match="shape"):
        open_tokens(token_folder).train_reader(4, 1, 0, 1, cursor)


def test_too_few_held_out_rows_says_how_many_there_are(text_folder, token_folder, tokenizer_path):
    texts = open_text(text_folder, tokenizer_path, validation_fraction=0.15)
    tokens = open_tokens(token_folder)
    messages = {message_of(data.validation_batches, 10_000, 1, 0, 1) for data in (texts, tokens)}
    assert len(messages) == 1
    message = messages.pop()
    num_rows = int(message.split("fill only ")[1].split()[0])
    assert "evaluation.num_samples" in message and num_rows > 10
    assert len(texts.validation_batches(num_rows, 1, 0, 1)) == len(tokens.validation_batches(num_rows, 1, 0, 1))
    none = open_text(text_folder, tokenizer_path, validation_fraction=0.0)
    assert "fill only 0" in message_of(none.validation_batches, 1, 1, 0, 1)


def test_the_suggested_number_of_held_out_rows_works(text_folder, token_folder, tokenizer_path):
    """It is a multiple of a micro-batch on all replicas; where there is not one, no validation is suggested."""
    for data in (open_text(text_folder, tokenizer_path, validation_fraction=0.15), open_tokens(token_folder)):
        suggested = int(message_of(data.validation_batches, 7 * 10_000, 7, 0, 5).split("set it to ")[1].split()[0])
        assert suggested % 35 == 0 and data.validation_batches(suggested, 7, 0, 5)
        with pytest.raises(UserError):
            data.validation_batches(suggested + 35, 7, 0, 5)
        message = message_of(data.validation_batches, 1000, 1000, 0, 1)
        assert "less than one micro-batch" in message and "set it to 0" in message


# Token shards -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tokens(tmp_path, token_folder):
    folder = tmp_path / "tokens"
    shutil.copytree(token_folder, folder)
    return folder


def edit_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_missing_and_cut_files_are_named_at_once(tokens):
    first, second, *_ = sorted(tokens.glob("train/*.bin"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-2])
    message = message_of(open_tokens, tokens)
    assert str(first) in message and str(second) in message


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.bin", "train/../../x.bin", "C:\\x.bin", ""])
def test_manifest_may_not_leave_its_folder(tokens, path):
    edit_manifest(tokens, lambda manifest: manifest["splits"]["train"][0].update(file=path))
    message = message_of(open_tokens, tokens)
    assert "splits.train.0.file" in message and "inside of the folder" in message


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda manifest: manifest.update(version=2), "version"),
        (lambda manifest: manifest.update(format="other"), "format"),
        (lambda manifest: manifest.update(extra=1), "extra"),
        (lambda manifest: manifest.pop("dtype"), "dtype"),
        (lambda manifest: manifest["totals"]["train"].update(num_tokens=1), "totals"),
        (lambda manifest: manifest["splits"]["train"][0].update(num_bytes=2), "bytes"),
    ],
)
def test_manifest_that_breaks_its_schema(tokens, change, word):
    edit_manifest(tokens, change)
    message = message_of(open_tokens, tokens)
    assert "manifest.json" in message and word in message


def test_manifest_that_is_not_json(tokens):
    (tokens / "manifest.json").write_text("{")
    assert "manifest.json" in message_of(open_tokens, tokens)


def test_other_tokenizer_than_the_one_of_the_tokens(tokens, tmp_path):
    other = train_model(tmp_path / "other.model", vocab_size=300)
    assert "data.tokenizer" in message_of(open_tokens, tokens, other)
    shutil.copy(other, tokens / "tokenizer.model")
    assert str(tokens / "tokenizer.model") in message_of(open_tokens, tokens)


def test_token_id_outside_of_the_vocabulary_names_its_file(tokens):
    path = sorted(tokens.glob("train/*.bin"))[1]
    ids = np.fromfile(path, dtype="<u2")
    ids[5] = 512
    ids.tofile(path)
    data = open_tokens(tokens)
    reader = data.train_reader(1, 1, 0, 1)
    message = message_of(lambda: [next(reader) for _ in range(data.describe()["samples_per_epoch"])])
    assert str(path) in message and "512" in message
    open_tokens(tokens, vocab_size=513).train_reader(1, 1, 0, 1)


def test_too_few_tokens_for_one_row(tokens):
    num_tokens = open_tokens(tokens).describe()["num_train_tokens"]
    assert open_tokens(tokens, seq_length=num_tokens - 1).describe()["samples_per_epoch"] == 1
    message = message_of(open_tokens, tokens, seq_length=num_tokens)
    assert "data.path" in message and str(num_tokens) in message


def test_split_is_pinned():
    """A change here puts documents that were held out into training."""
    held_out = [number for number in range(200) if is_validation(f"document {number}".encode(), 0.05)]
    assert held_out == PINNED_HELD_OUT
    assert not any(is_validation(f"{number}".encode(), 0.0) for number in range(100))
    assert sum(is_validation(f"{number}".encode(), 0.25) for number in range(10_000)) == pytest.approx(2500, abs=150)


PINNED_HELD_OUT = [40, 70, 100, 118, 123, 129, 148, 163]
