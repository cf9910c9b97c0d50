"""How fast text is tokenised and batches are read, compared with the bare libraries on the same text in one process.

Preparation is measured in CPU seconds of all threads, because CPU time is what many workers on many cores cost and is
less disturbed by other work on the machine. Readers are measured in wall time. The variants run in turn, and each
variant's best round counts.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from megastruct.config.data import DataConfig
from megastruct.data import Tokenizer, open_data, open_tokenizer
from megastruct.data.options import DataOptions
from megastruct.data.preparation.prepare import prepare
from megastruct.data.sources.place import Place
from megastruct.data.sources.reading import read_patiently
from megastruct.data.tokenizers.sentence_piece import SentencePieceTokenizer

SEQ_LENGTH = 2048
GLOBAL_BATCH_SIZE = 32
MICRO_BATCH_SIZE = 8
READER_SECONDS = 4.0
_TEXTS_AT_ONCE = 64


class Row(NamedTuple):
    """One variant: how many tokens it produced, and how fast."""

    name: str
    num_tokens: int
    tokens_per_second: float


class Measured(NamedTuple):
    """Speeds of `preparing` in tokens per CPU second, and of `reading` in tokens per second in the training process."""

    num_documents: int
    num_characters: int
    preparing: list[Row]
    reading: list[Row]


def measure(
    input_path: str, tokenizer_path: str, text_columns: tuple[str, ...], max_characters: int, rounds: int
) -> Measured:
    """Measure on the first documents of `input_path`, about `max_characters` in all, in `rounds` rounds.

    Raises:
        UserError: the text or the tokenizer cannot be read.
    """
    tokenizer = open_tokenizer(tokenizer_path, "--tokenizer")
    texts = _texts(input_path, text_columns, max_characters)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").mkdir()
        for part in range(4):  # several shards, so that there are several streams to read
            table = pa.table({"content": texts[part::4]})
            pq.write_table(table, folder / "text" / f"{part}.parquet", compression="zstd")
        preparing = _measure_preparing(folder, tokenizer, texts, rounds)
        return Measured(len(texts), sum(map(len, texts)), preparing, _measure_reading(folder, tokenizer))


def _texts(input_path: str, text_columns: tuple[str, ...], max_characters: int) -> list[str]:
    texts: list[str] = []
    num_characters = 0
    for shard in Place(input_path, "--input", text_columns=text_columns).find().shards:
        for documents in read_patiently(shard, shard.text_column):
            texts += [document.text for document in documents if not document.broken]
            num_characters += sum(len(document.text) for document in documents)
            if num_characters >= max_characters:
                return texts
    return texts


def _measure_preparing(folder: Path, tokenizer: Tokenizer, texts: list[str], rounds: int) -> list[Row]:
    outputs = iter(range(1000))

    def prepared() -> int:
        output = folder / f"tokens-{next(outputs)}"
        manifest = prepare(str(folder / "text"), output, str(tokenizer.path), report=lambda _: None)
        return manifest.totals.train.num_tokens + manifest.totals.validation.num_tokens

    name, bare = _bare(tokenizer, texts)
    ways: dict[str, Callable[[], int]] = {name: bare, "tools/prepare_data.py": prepared}
    ways["datasets.map, Hugging Face fast tokenizer"] = _mapped(folder, tokenizer, texts)
    best: dict[str, Row] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            num_tokens = way()
            row = Row(name, num_tokens, num_tokens / (time.process_time() - start))
            best[name] = max(best.get(name, row), row, key=lambda row: row.tokens_per_second)
    return list(best.values())


def _bare(tokenizer: Tokenizer, texts: list[str]) -> tuple[str, Callable[[], int]]:
    """The name of the library behind a tokenizer, and its own encoding of all texts with one thread."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        processor = tokenizer.processor
        return "SentencePiece, encode alone", lambda: sum(
            map(len, processor.encode(texts, out_type="numpy", num_threads=1))
        )
    fast, starts = fast_tokenizer(tokenizer), range(0, len(texts), _TEXTS_AT_ONCE)
    return "tokenizers, encode_batch alone", lambda: sum(
        len(encoding) for start in starts for encoding in fast.encode_batch(texts[start : start + _TEXTS_AT_ONCE])
    )


def _mapped(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> Callable[[], int]:
    """Tokenise with `datasets.map` into its cache file, with one process and one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import datasets

    datasets.disable_progress_bars()
    fast = fast_tokenizer(tokenizer)
    dataset = datasets.Dataset.from_dict({"content": texts})
    numbers = iter(range(1000))

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [encoding.ids for encoding in fast.encode_batch_fast(batch["content"])]}

    def run() -> int:
        cache = str(folder / f"mapped-{next(numbers)}.arrow")
        mapped = dataset.map(encode, batched=True, remove_columns=["content"], cache_file_name=cache)
        return sum(len(column.flatten()) for column in mapped.data.column("ids").chunks)

    return run


def fast_tokenizer(tokenizer: Tokenizer) -> Any:
    """A `tokenizers.Tokenizer`: of a tokenizer.json, or with the pieces and merges of a SentencePiece BPE model.

    Like most fast tokenizers it splits at spaces before it merges, so its ids differ from SentencePiece's where several
    spaces follow each other.
    """
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models, pre_tokenizers

    if not isinstance(tokenizer, SentencePieceTokenizer):
        return FastTokenizer.from_file(str(tokenizer.path))
    processor = tokenizer.processor
    pieces = [processor.id_to_piece(id_) for id_ in range(tokenizer.vocab_size)]
    vocabulary = {piece: id_ for id_, piece in enumerate(pieces)}
    merges = []
    for id_, piece in enumerate(pieces):
        if processor.is_byte(id_) or processor.is_control(id_) or processor.is_unknown(id_):
            continue
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(-processor.get_score(id_), pair) for pair in known]
    merges.sort(key=lambda merge: merge[0])
    unknown = pieces[processor.unk_id()]
    model = models.BPE(vocabulary, [pair for _, pair in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    fast = FastTokenizer(model)
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return fast


def _measure_reading(folder: Path, tokenizer: Tokenizer) -> list[Row]:
    def speed(name: str, kind: Literal["tokens", "text"], path: Path, num_workers: int = 0) -> Row:
        config = DataConfig(kind=kind, path=str(path), tokenizer=str(tokenizer.path), num_workers=num_workers)
        data = open_data(DataOptions(config, SEQ_LENGTH, tokenizer.vocab_size, seed=0))
        reader = data.train_reader(GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE, 0, 1)
        for _ in islice(reader, GLOBAL_BATCH_SIZE // MICRO_BATCH_SIZE):  # workers start, files are opened
            pass
        start, num_tokens = time.perf_counter(), 0
        while time.perf_counter() - start < READER_SECONDS:
            num_tokens += next(reader).ids.numel()
        return Row(name, num_tokens, num_tokens / (time.perf_counter() - start))

    return [
        speed("token shards", "tokens", folder / "tokens-0"),
        speed("text shards, data.num_workers=0", "text", folder / "text"),
        speed("text shards, data.num_workers=1", "text", folder / "text", 1),
        speed("text shards, data.num_workers=2", "text", folder / "text", 2),
    ]
