"""What a newcomer adds: a format, a storage, a tokenizer, each a class of this file and an entry in its registry."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from megastruct.data import open_tokenizer
from megastruct.data.preparation.prepare import prepare
from megastruct.data.protocols import DocumentFormat, FileState, Tokenizer, TrainingData
from megastruct.data.sources.documents import Document, document_from_bytes
from megastruct.data.sources.find import Search
from megastruct.data.sources.formats import FORMATS
from megastruct.data.sources.shards import TextShard
from megastruct.data.sources.storages import STORAGES, storage_of
from megastruct.data.tokenizers.open import TOKENIZERS
from megastruct.data.tokenizers.options import TokenizerOptions
from megastruct.errors import Problem, UserError
from tiny_data import SEED, SEQ_LENGTH, VALIDATION_FRACTION, make_texts, open_kind, write_parquet

TEXTS = [text for shard in range(2) for text in make_texts(shard) if text and text.strip()][:60]


class PlainText:
    """A file is a document."""

    endings = (".doc",)
    damage = ()

    def check(self, shard: TextShard, text_column: str) -> Problem | None:
        return Problem(shard.uri, "is too large for a document") if shard.num_bytes > 10_000 else None

    def num_documents(self, shard: TextShard) -> int | None:
        return 1

    def documents(self, shard: TextShard, text_column: str, start: int) -> Iterator[list[Document]]:
        if start == 0:
            with storage_of(shard).open(shard) as file:
                yield [document_from_bytes(0, file.read())]


class Bucket:
    """bucket://NAME: the files of a dictionary, as an object store has them. The next reads raise `errors`."""

    request_bytes = 1000

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.errors: list[Exception] = []

    def find(self, search: Search) -> list[TextShard] | None:
        if not search.path.startswith("bucket://"):
            return None
        names = search.text_names(list(self.files), f"the bucket {search.path}")
        return [TextShard(f"{search.path}/{name}", name, *self._state(name)) for name in names]

    def open(self, shard: TextShard) -> io.BufferedIOBase:
        if self.errors:
            raise self.errors.pop(0)
        return io.BytesIO(self.files[shard.name])

    def state(self, shard: TextShard) -> FileState:
        return self._state(shard.name)

    def _state(self, name: str) -> FileState:
        return FileState(len(self.files[name]), hashlib.sha256(self.files[name]).hexdigest())

    def commit_of(self, shard: TextShard) -> str | None:
        return None

    def may_pass(self, shard: TextShard, error: Exception) -> bool:
        return isinstance(error, ConnectionError)

    def refusal(self, shard: TextShard, error: Exception) -> Problem | None:
        return Problem(shard.uri, "no access") if isinstance(error, PermissionError) else None


class Bytes:
    """The bytes of UTF-8 as ids; the file holds the id that ends a document."""

    file_name = "tokenizer.bytes"

    bos_id = None

    def __init__(self, path: Path, where: str, options: TokenizerOptions) -> None:
        self.path = path
        self.files = {self.file_name: path.read_bytes()}
        self.fingerprint = hashlib.sha256(self.files[self.file_name]).hexdigest()
        self.eod_id, self.vocab_size = int(self.files[self.file_name]), 257

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.append(ids, np.int32(self.eod_id)) for ids in self.encode(texts)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(id_ for id_ in np.asarray(ids).tolist() if id_ != self.eod_id).decode()

    def num_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        return int(np.count_nonzero(np.asarray(ids) != self.eod_id))

    def pieces(self) -> dict[str, int]:
        return {chr(id_): id_ for id_ in range(256)}


@pytest.fixture
def plain_text() -> Iterator[DocumentFormat]:
    FORMATS.append(PlainText())
    yield FORMATS[-1]
    FORMATS.pop()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    bucket = Bucket({})
    monkeypatch.setitem(STORAGES, "bucket", bucket)
    return bucket


@pytest.fixture
def parquet_folder(tmp_path: Path) -> Path:
    """A shard for each document."""
    folder = tmp_path / "parquet"
    folder.mkdir()
    for index, text in enumerate(TEXTS):
        write_parquet(folder / f"{index:02}.parquet", [text])
    return folder


def open_here(path: str | Path, tokenizer_path: Path, **keys) -> TrainingData:
    values = {"seq_length": SEQ_LENGTH, "vocab_size": 512, "seed": SEED, "validation_fraction": VALIDATION_FRACTION}
    return open_kind("text", str(path), tokenizer_path, **{**values, "num_streams": 2, **keys})


def read(data: TrainingData) -> list:
    """Samples of more than two epochs, a resume among them, and held-out rows."""
    reader = data.train_reader(4, 4, 0, 1)
    rows = [next(reader).ids.tolist() for _ in range(20)]
    reader = data.train_reader(4, 2, 0, 1, reader.cursor(), 80)
    rows += [next(reader).ids.tolist() for _ in range(20)]
    cursor = reader.cursor()
    assert cursor[:, 0].min() >= 1 and cursor.shape == data.cursor_shape
    return [rows, cursor.tolist(), [batch.ids.tolist() for batch in data.validation_batches(4, 2, 0, 1)]]


def token_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.bin"))}


def test_a_new_format_is_read_as_the_others_are(plain_text, parquet_folder, tokenizer_path, tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    for index, text in enumerate(TEXTS):
        (folder / f"{index:02}.doc").write_text(text)
    plain, parquet = open_here(folder, tokenizer_path), open_here(parquet_folder, tokenizer_path)
    assert read(plain) == read(parquet)
    for source in (folder, parquet_folder):
        prepare(str(source), tmp_path / f"{source.name}-tokens", str(tokenizer_path), report=lambda _: None)
    assert token_bytes(tmp_path / "plain-tokens") == token_bytes(tmp_path / "parquet-tokens")

    (folder / "07.doc").write_bytes(b"\xff")  # a broken document, which is skipped and counted
    reader = open_here(folder, tokenizer_path, num_streams=1).train_reader(1, 1, 0, 1)
    while reader.cursor()[0, 0] < 2:
        next(reader)
    assert plain.skipped_documents(reader.cursor()) == 2
    (folder / "09.doc").write_text("x" * 20_000)
    with pytest.raises(UserError, match=r"09\.doc: is too large"):
        open_here(folder, tokenizer_path)


def test_without_its_entry_a_format_is_not_known(tokenizer_path, tmp_path):
    (tmp_path / "a.doc").write_text("river")
    with pytest.raises(
        UserError, match=r"no text shard .*\n.*\.parquet, .*\.jsonl, \.ndjson, \.json, \.jsonl\.gz, .*\.text\.xz$"
    ):
        open_here(tmp_path, tokenizer_path)


def as_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"content": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "doc"])
def test_a_new_storage_has_files_of_every_format(plain_text, bucket, parquet_folder, tokenizer_path, ending):
    for path in sorted(parquet_folder.iterdir()):
        text = TEXTS[int(path.stem)]
        contents = {"parquet": path.read_bytes(), "jsonl": as_lines([text]), "doc": text.encode()}
        bucket.files[f"{path.stem}.{ending}"] = contents[ending]
    data = open_here("bucket://corpus", tokenizer_path)
    assert read(data) == read(open_here(parquet_folder, tokenizer_path))
    assert "hub_commits" not in data.describe()


def test_a_storage_says_what_may_pass_and_what_it_refuses(bucket, tokenizer_path, tmp_path, capsys):
    texts = {"a.jsonl": TEXTS[:30], "b.jsonl": TEXTS[30:]}
    bucket.files |= {name: as_lines(own) for name, own in texts.items()}
    for name, content in bucket.files.items():
        (tmp_path / name).write_bytes(content)
    data = open_here("bucket://corpus", tokenizer_path)
    bucket.errors = [ConnectionResetError("away"), ConnectionResetError("away")]
    assert read(data) == read(open_here(tmp_path, tokenizer_path))
    assert capsys.readouterr().err.count("ConnectionResetError: away; trying again") == 2
    bucket.errors = [PermissionError()]
    with pytest.raises(UserError, match=r"bucket://corpus/.\.jsonl: no access"):
        next(data.train_reader(1, 1, 0, 1))
    bucket.errors = [OSError("cut")]
    with pytest.raises(UserError, match=r"bucket://corpus/.\.jsonl: .*damaged or cut short \(cut\)"):
        next(data.train_reader(1, 1, 0, 1))
    bucket.files = {name: content + b"\n" for name, content in bucket.files.items()}
    with pytest.raises(UserError, match=r"bucket://corpus/.\.jsonl: .*changed"):
        next(data.train_reader(1, 1, 0, 1))
    bucket.files = {}
    with pytest.raises(UserError, match="the bucket bucket://corpus has no text shard among its 0 files"):
        open_here("bucket://corpus", tokenizer_path)


def test_a_new_tokenizer_is_chosen_by_its_ending_and_kept_with_the_tokens(parquet_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(TOKENIZERS, ".bytes", Bytes)
    (tmp_path / "x.bytes").write_text("256")
    tokenizer: Tokenizer = open_tokenizer(tmp_path / "x.bytes")
    data = open_here(parquet_folder, tmp_path / "x.bytes", num_streams=1)
    ids = next(data.train_reader(1, 1, 0, 1)).ids[0].tolist()
    assert any(text.encode().startswith(bytes(ids[:10])) for text in TEXTS)
    prepare(str(parquet_folder), tmp_path / "tokens", str(tmp_path / "x.bytes"), report=lambda _: None)
    assert (tmp_path / "tokens" / "tokenizer.bytes").read_text() == "256"
    (tmp_path / "x.bytes").unlink()
    data = open_kind("tokens", str(tmp_path / "tokens"), None, seq_length=SEQ_LENGTH, vocab_size=257, seed=SEED)
    assert data.tokenizer.fingerprint == tokenizer.fingerprint and data.tokenizer.eod_id == 256
    assert data.tokenizer.decode(next(data.train_reader(1, 1, 0, 1)).ids[0].tolist())
    with pytest.raises(UserError, match=r"model\.vocab_size: 256"):
        open_kind("tokens", str(tmp_path / "tokens"), None, seq_length=SEQ_LENGTH, vocab_size=256, seed=SEED)
