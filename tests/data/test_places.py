"""What lies in a place is read, or named and counted: formats, endings, columns, several places."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shlex
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from megastruct.commands import prepare as prepare_data
from megastruct.commands import train_tokenizer
from megastruct.config.data import DataConfig
from megastruct.data import open_data
from megastruct.data.options import DataOptions
from megastruct.data.preparation.prepare import prepare
from megastruct.data.sources.choice import EVERYTHING, Choice
from megastruct.data.sources.place import Place, find_corpus
from megastruct.data.sources.plain_text import MAX_BYTES
from megastruct.data.sources.reading import read_patiently
from megastruct.data.tokens.manifest import load_manifest
from megastruct.errors import UserError
from test_readers import open_tiny
from tiny_data import make_texts, open_kind, train_model, write_parquet

TEXTS = [text for text in make_texts(1) if text and text.strip()][:12]


def lines_of(texts, column="content") -> bytes:
    return "".join(json.dumps({column: text, "id": 1}) + "\n" for text in texts).encode()


def zstd(content: bytes) -> bytes:
    half = len(content) // 2  # two frames, as parallel compressors write
    return b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in (content[:half], content[half:]))


def write(folder, files: dict[str, bytes]):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def texts_of(shards) -> list[str]:
    return [document.text for shard in shards for part in read_patiently(shard, shard.text_column) for document in part]


def find(path, choice=EVERYTHING, validation_split=None, where="--input", **place):
    paths = path if isinstance(path, list) else [path]
    return find_corpus([Place(str(own), where, choice, **place) for own in paths], validation_split)


def message_of(function, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    return str(caught.value)


# Formats ----------------------------------------------------------------------------------------------------------

FORMS = {
    "a.PARQUET": None,
    "b.arrow": None,
    "c.feather": None,
    "d.jsonl": lambda lines: lines,
    "e.NDJSON": lambda lines: lines,
    "f.Json": lambda lines: lines,
    "g.jsonl.gz": gzip.compress,
    "h.json.zst": zstd,
    "i.JSONL.ZSTD": zstd,
    "j.ndjson.bz2": bz2.compress,
    "k.jsonl.xz": lzma.compress,
}


@pytest.fixture(scope="module")
def every_format(tmp_path_factory):
    """One file of each kind with the same documents."""
    folder = tmp_path_factory.mktemp("formats") / "text"
    write(folder, {name: form(lines_of(TEXTS)) for name, form in FORMS.items() if form})
    write_parquet(folder / "a.PARQUET", TEXTS)
    table = pa.table({"id": range(len(TEXTS)), "content": TEXTS})
    with pa.ipc.new_stream(str(folder / "b.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    pyarrow.feather.write_feather(table, folder / "c.feather", chunksize=5)
    return folder


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("start", [0, 1, 5, 11, 12])
def test_every_format_has_the_same_documents_from_any_start(every_format, name, start):
    [shard] = find(every_format / name).shards
    documents = [document for part in read_patiently(shard, "content", start) for document in part]
    assert [document.text for document in documents] == TEXTS[start:]
    assert [document.index for document in documents] == list(range(start, len(TEXTS)))


def test_all_formats_of_a_place_are_read_and_the_rest_is_named(every_format, tmp_path, tokenizer_path, capsys):
    folder = shutil.copytree(every_format, tmp_path / "text")
    write(
        folder, {"sub/book.txt": b"\xef\xbb\xbfA book.\nIts second line.", "sub/more.TXT.gz": gzip.compress(b"More.")}
    )
    write(folder, {"README.md": b"# x", "LICENSE.txt": b"MIT", "t.csv": b"a,b", ".h.jsonl": b"{", "info.json": b"{}"})
    prepare_data.main(["--input", str(folder), "--output", f"{tmp_path}/out", "--tokenizer", str(tokenizer_path)])
    manifest, out = load_manifest(tmp_path / "out"), capsys.readouterr().out
    names = [source.name for source in manifest.settings.sources]
    assert names == [*FORMS, "sub/book.txt", "sub/more.TXT.gz"]
    assert sum(getattr(manifest.totals, split).num_documents for split in ("train", "validation")) == 11 * 12 + 2
    first = out.splitlines()[0]
    assert f"reading {folder}: 13 shards" in first and "1 .jsonl.zstd" in first and "column 'content'" in first
    assert "no text in a known format: 3 files (LICENSE.txt, README.md, t.csv)" in out
    assert "no column 'content': 1 file (info.json)" in out and "hidden: 1 file (.h.jsonl)" in out


@pytest.mark.parametrize(
    "name, num_workers", [("c.jsonl.zst", 2), ("c.jsonl.zst", 1), ("c.jsonl.bz2", 1), ("c.jsonl.xz", 1), ("c.arrow", 1)]
)
def test_a_file_that_is_cut_short_is_named(name, num_workers, tmp_path, tokenizer_path, capsys):
    rng = np.random.default_rng(0)
    texts = ["".join(chr(97 + c) for c in rng.integers(0, 26, 200)) for _ in range(300)]
    table = pa.table({"content": texts})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    packed = {"zst": zstd, "bz2": bz2.compress, "xz": lzma.compress}
    ending = name.rpartition(".")[2]
    content = packed[ending](lines_of(texts)) if ending in packed else sink.getvalue().to_pybytes()
    write(tmp_path / "text", {name: content[:-10], "good.jsonl": lines_of(TEXTS)})
    options = ["--output", f"{tmp_path}/out", "--tokenizer", str(tokenizer_path), "--workers", str(num_workers)]
    with pytest.raises(SystemExit):
        prepare_data.main(["--input", str(tmp_path / "text"), *options])
    error = capsys.readouterr().err
    assert f"{tmp_path}/text/{name}: the file cannot be read; it is damaged or cut short" in error
    assert "Traceback" not in error and "good.jsonl" not in error
    if ending in ("zst", "arrow"):  # found before anything was begun
        assert "try: remove it, or download it again" in error
        return
    assert "try: download it again, and repeat the command; or begin anew without it" in error
    (tmp_path / "text" / name).write_bytes(content)
    prepare_data.main(["--input", str(tmp_path / "text"), *options])
    assert "continuing an interrupted run: 1 of 2 shards are done" in capsys.readouterr().out


@pytest.mark.parametrize("compress", [zstd, bz2.compress, lzma.compress], ids=["zst", "bz2", "xz"])
def test_training_resumes_exactly_in_a_compressed_file(compress, tmp_path, tokenizer_path):
    ending = {zstd: "zst", bz2.compress: "bz2", lzma.compress: "xz"}[compress]
    texts = [text for shard in range(3) for text in make_texts(shard) if text]
    plain = write(tmp_path / "plain", {"a.jsonl": lines_of(texts)})
    packed = write(tmp_path / "packed", {f"a.jsonl.{ending}": compress(lines_of(texts))})
    reader = open_tiny("text", plain, tokenizer_path).train_reader(4, 4, 0, 1)
    expected = [next(reader).ids.tolist() for _ in range(40)]
    reader = open_tiny("text", packed, tokenizer_path).train_reader(4, 4, 0, 1)
    rows = [next(reader).ids.tolist() for _ in range(13)]
    reader = open_tiny("text", packed, tokenizer_path).train_reader(4, 4, 0, 1, reader.cursor(), 13 * 4)
    assert rows + [next(reader).ids.tolist() for _ in range(27)] == expected


def test_a_text_file_that_is_too_large_for_a_document_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("megastruct.data.sources.plain_text.MAX_BYTES", 1000)
    assert MAX_BYTES > 1000
    write(tmp_path, {"a.txt.gz": gzip.compress(b"x" * 1001), "b.txt": b"x" * 1000})
    first, second = find(tmp_path).shards
    assert "is one document" in message_of(texts_of, [first]) and texts_of([second]) == ["x" * 1000]


def test_a_file_that_is_given_is_read_whatever_its_name_is(tmp_path):
    write(tmp_path, {"LICENSE.txt": b"MIT", ".hidden.jsonl": lines_of(TEXTS)})
    assert texts_of(find(tmp_path / "LICENSE.txt").shards) == ["MIT"]
    assert texts_of(find(tmp_path / ".hidden.jsonl").shards) == TEXTS
    assert "no text shard" in message_of(find, tmp_path)


def test_folders_of_save_to_disk(tmp_path):
    """The rows as `datasets` has them, without the caches that `map` leaves there; splits are the saved ones."""

    def dataset(texts):
        return datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": texts})

    dataset(TEXTS).save_to_disk(str(tmp_path / "one"), num_shards=2)
    again = datasets.load_from_disk(str(tmp_path / "one"))
    again.map(lambda row: {"text": row["text"] + "!"})
    assert list((tmp_path / "one").glob("cache-*.arrow"))
    corpus = find(tmp_path / "one")
    assert texts_of(corpus.shards) == again["text"][:] and len(corpus.shards) == 2
    named = "\n".join(corpus.lines())
    assert "cache-" in named and "state.json" in named and "text column 'text'" in named

    parts = {"train": dataset(TEXTS[:5]), "unlabelled": dataset(TEXTS[5:])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "several"))
    assert "train (1 file), unlabelled (1 file)" in message_of(find, tmp_path / "several")
    assert texts_of(find(tmp_path / "several", Choice(split="unlabelled")).shards) == TEXTS[5:]


# Columns ----------------------------------------------------------------------------------------------------------


def test_the_column_is_content_or_else_text(tmp_path, tokenizer_path):
    (tmp_path / "a").mkdir()
    write_parquet(tmp_path / "a" / "x.parquet", TEXTS)
    write(tmp_path, {"b/x.jsonl": lines_of(TEXTS, "text"), "c/x.jsonl": lines_of(TEXTS, "body")})
    both = pa.table({"text": ["t"] * 3, "content": ["c"] * 3})
    (tmp_path / "d").mkdir()
    pq.write_table(both, tmp_path / "d" / "x.parquet")
    found = {name: find(tmp_path / name).train[0].text_column for name in "abd"}
    assert found == {"a": "content", "b": "text", "d": "content"}
    assert find(tmp_path / "d", text_columns=("text",)).train[0].text_column == "text"
    for kind in ("prepare", "train"):
        with pytest.raises(UserError, match=r"column 'content' is missing; the columns are: body, id\n.*text_column"):
            if kind == "train":
                open_tiny("text", tmp_path / "c", tokenizer_path)
            else:
                prepare(str(tmp_path / "c"), tmp_path / "out", str(tokenizer_path))
    assert not (tmp_path / "out").exists()


def test_the_column_of_a_run_is_recorded_and_kept(tmp_path, tokenizer_path):
    """It is looked for once: a later look at the cache, or at the record of the run, finds it there."""
    folder = write(tmp_path / "text", {"x.jsonl": lines_of(TEXTS, "text")})
    report: list[str] = []
    data = DataConfig(kind="text", path=str(folder), tokenizer=str(tokenizer_path), num_workers=0)
    options = DataOptions(data, 8, 512, 0, tmp_path / "cache", report=report.append)
    assert open_data(options).describe()["text_column"] == "text"
    assert any("text column 'text'" in line for line in report)
    assert list((tmp_path / "cache").glob("column-*"))
    kept = DataOptions(data, 8, 512, 0, text_column="id")
    assert open_data(kept).describe()["text_column"] == "id"


def test_sources_of_a_mixture_have_columns_of_their_own(tmp_path, tokenizer_path):
    write(tmp_path, {"a/x.jsonl": lines_of(TEXTS), "b/x.jsonl": lines_of(TEXTS, "text")})
    options = {"seq_length": 8, "vocab_size": 512, "seed": 0}
    data = open_kind("text", [(tmp_path / "a", 1), (tmp_path / "b", 1)], tokenizer_path, **options)
    assert data.describe()["text_column"] == ["content", "text"]
    reader = data.train_reader(2, 2, 0, 1)
    for _ in range(20):
        next(reader)
    assert (reader.cursor()[:, :3].sum(axis=1) > 0).all()  # both were read


# Several places ---------------------------------------------------------------------------------------------------


def test_several_inputs_are_one_corpus(tmp_path, tokenizer_path):
    write(tmp_path, {"a/x.jsonl": lines_of(TEXTS[:4]), "b/x.jsonl": lines_of(TEXTS[4:], "text")})
    write(tmp_path, {"all/x.jsonl": lines_of(TEXTS)})
    options = ["--tokenizer", str(tokenizer_path), "--validation-fraction", "0"]
    inputs = ["--input", f"{tmp_path}/a", "--input", f"{tmp_path}/b"]
    prepare_data.main([*inputs, "--output", f"{tmp_path}/two", *options])
    prepare_data.main(["--input", f"{tmp_path}/all", "--output", f"{tmp_path}/one", *options])
    tokens = [b"".join(p.read_bytes() for p in sorted((tmp_path / o / "train").iterdir())) for o in ("one", "two")]
    assert tokens[0] == tokens[1]
    sources = load_manifest(tmp_path / "two").settings.sources
    assert [(source.name, source.text_column) for source in sources] == [("a/x.jsonl", None), ("b/x.jsonl", "text")]
    train_tokenizer.main([*inputs, "--output", f"{tmp_path}/new", "--vocab-size", "300"])

    both = open_tiny("text", tmp_path / "all", tokenizer_path, validation_fraction=0.0)
    paths = DataConfig(kind="text", path=[f"{tmp_path}/a", f"{tmp_path}/b"], tokenizer=str(tokenizer_path))
    several = open_data(DataOptions(paths, 32, 512, 0))
    assert several.describe()["num_shards"] == 2 and several.describe()["num_bytes"] > 0
    assert both.cursor_shape[1] == several.cursor_shape[1]


def test_a_file_in_two_places_is_refused(tmp_path):
    write(tmp_path, {"a/x.jsonl": lines_of(TEXTS), "a/y.jsonl": lines_of(TEXTS)})
    message = message_of(find, [tmp_path / "a", tmp_path / "a" / "x.jsonl"])
    assert "a/x.jsonl" in message and "read twice" in message and "--input" in message


def test_a_file_in_two_places_is_refused_however_it_is_spelt(tmp_path):
    write(tmp_path, {"a/x.jsonl": lines_of(TEXTS), "b/y.jsonl": lines_of(TEXTS)})
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for other in (f"{tmp_path}/b/../a", f"{tmp_path}/link", f"{tmp_path}/li*/*"):
        assert "read twice" in message_of(find, [tmp_path / "a", other])
    (tmp_path / "a" / "train.jsonl").symlink_to("x.jsonl")
    (tmp_path / "a" / "test.jsonl").symlink_to("x.jsonl")
    message = message_of(find, tmp_path / "a", Choice(split="train"), "test")
    assert "1 files are trained on and held out, such as " in message


def test_links_to_folders_are_followed_once(tmp_path):
    write(tmp_path, {"text/real/x.jsonl": lines_of(TEXTS), "other/deep/y.jsonl": lines_of(TEXTS), "other/z.txt": b"z"})
    for link, folder in {"a": "real", "loop": ".", "out": "../other", "z": "../other/deep"}.items():
        (tmp_path / "text" / link).symlink_to(folder)
    found = find(tmp_path / "text")
    assert [shard.name for shard in found.shards] == ["out/deep/y.jsonl", "out/z.txt", "real/x.jsonl"]
    assert found.lines()[1:] == ["  not read, to a folder that is read already: 3 links (a, loop, z)"]
    by_pattern = find(f"{tmp_path}/text/**/*.jsonl")
    assert [shard.name for shard in by_pattern.shards] == ["a/x.jsonl", "z/y.jsonl"]  # by the shortest of 80 paths
    assert "not read, read already by a shorter path" in by_pattern.lines()[1]


def test_what_is_no_file_is_named(tmp_path):
    write(tmp_path / "text", {"x.jsonl": lines_of(TEXTS)})
    (tmp_path / "text" / "gone.jsonl").symlink_to("nowhere")
    os.mkfifo(tmp_path / "text" / "pipe.jsonl")  # opening it would wait for ever
    for place in ("text", "text/*"):
        message = message_of(find, tmp_path / place)
        assert f"{tmp_path}/text/gone.jsonl: a link to nowhere, which does not exist" in message
        assert f"{tmp_path}/text/pipe.jsonl: is no plain file" in message
    assert "a link to nowhere" in message_of(find, tmp_path / "text" / "gone.jsonl")


def test_a_folder_that_a_pattern_names_is_named(tmp_path):
    """As Spark writes them: the folder has the ending of a file."""
    write(tmp_path, {"x.jsonl": lines_of(TEXTS), "y.jsonl/part-0.jsonl": lines_of(TEXTS), "y.jsonl/_SUCCESS": b""})
    found = find(f"{tmp_path}/*.jsonl")
    note = f"  not read, named by the pattern, which should name files: 1 folder ({tmp_path}/y.jsonl)"
    assert [shard.name for shard in found.shards] == ["x.jsonl"] and found.lines()[1:] == [note]
    message = message_of(find, f"{tmp_path}/y*")
    assert f"names 1 folder and no file ({tmp_path}/y.jsonl)" in message
    [suggested] = shlex.split(message.rpartition("their files: ")[2])
    assert [shard.name for shard in find(suggested).shards] == ["part-0.jsonl"]


# Documents without tokens -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def normaliser(tmp_path_factory):
    """A tokenizer with SentencePiece's default normalisation, which removes characters of no width."""
    return train_model(tmp_path_factory.mktemp("model") / "norm.model", byte_fallback=False, vocab_size=120)


def test_what_the_normaliser_empties_is_skipped_wherever_it_is_read(tmp_path, normaliser):
    empty = ["\u200b\u200b", "\ufeff", "\x01\x02", "\x7f"]
    folder = write(tmp_path / "text", {"a.jsonl": lines_of([*empty, *TEXTS[:3], *empty, *TEXTS[3:]])})
    clean = write(tmp_path / "clean", {"a.jsonl": lines_of(TEXTS)})
    manifest = prepare(str(folder), tmp_path / "out", str(normaliser), validation_fraction=0.0, report=lambda _: None)
    assert manifest.skipped_documents["no_tokens"] == 8 and manifest.totals.train.num_documents == 12
    readers = [
        open_tiny("text", place, normaliser, validation_fraction=0.0).train_reader(1, 1, 0, 1)
        for place in (folder, clean)
    ]
    while readers[0].cursor()[0, 0] < 1:
        rows = [next(reader).ids.tolist() for reader in readers]
        assert rows[0] == rows[1]
    assert readers[0].skipped_documents == 8 + 4 and readers[1].skipped_documents == 0  # four lead the second epoch
