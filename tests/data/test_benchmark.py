"""The benchmarks measure all ways on the same text."""

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megastruct.benchmarks.data import fast_tokenizer
from megastruct.commands import benchmark, make_sample_corpus, train_tokenizer
from megastruct.data import open_tokenizer
from megastruct.data.preparation.prepare import prepare
from megastruct.data.preparation.shard import ShardJob, make_shard
from megastruct.data.sources.find import find_shards
from megastruct.data.sources.reading import read_patiently
from tiny_data import make_texts, open_kind, write_parquet


def test_benchmark_prints_all_ways_side_by_side(text_folder, tokenizer_path, capsys, monkeypatch):
    monkeypatch.setattr("megastruct.benchmarks.data.READER_SECONDS", 0.1)
    monkeypatch.setattr("megastruct.benchmarks.data.SEQ_LENGTH", 16)
    arguments = ["--input", str(text_folder), "--tokenizer", str(tokenizer_path), "--rounds", "1"]
    benchmark.main(["data", *arguments])
    out = capsys.readouterr().out
    found = {
        name.strip(): (float(speed), int(count.replace(",", "")))
        for name, speed, count in re.findall(r"^  (.{44}) *([\d.]+) M tokens/s +[\d.]+%  ([\d,]+)$", out, re.MULTILINE)
    }
    bare, prepared = found["SentencePiece, encode alone"], found["tools/prepare_data.py"]
    num_documents = int(re.search(r"(\d+) documents", out)[1])
    assert prepared[1] == bare[1] + num_documents  # each ends with one more id
    assert {f"text shards, data.num_workers={workers}" for workers in (0, 1, 2)} | {"token shards"} < set(found)
    assert "datasets.map" in out
    with pytest.raises(SystemExit):
        benchmark.main(["data", *arguments, "--rounds", "0"])
    assert "--rounds" in capsys.readouterr().err


def test_benchmark_of_documents_compares_with_attention_across_borders(capsys):
    config = str(Path(__file__).resolve().parents[2] / "configs" / "run" / "quickstart.yaml")
    sizes = ["model.num_layers=1", "parallel.pp=1", "training.micro_batch_size=2", "hardware.device=cpu"]
    benchmark.main(["documents", config, *sizes, "--rounds", "1", "--mean-tokens", "20"])
    out = capsys.readouterr().out
    across, inside = re.findall(r"^  (?:across borders|inside, dense mask) +([\d.]+) ms +([\d.]+)", out, re.MULTILINE)
    assert across[1] == "1.00"
    assert float(inside[1]) == pytest.approx(float(inside[0]) / float(across[0]), abs=0.01)
    assert "2 x 128 tokens, 20 tokens per document" in out
    with pytest.raises(SystemExit):
        benchmark.main(["documents", config, "--mean-tokens", "0"])
    assert "--mean-tokens: 0 is less than 1" in capsys.readouterr().err


def test_token_shards_are_read_at_five_million_tokens_a_second(tmp_path, tokenizer_path):
    """In one process, from what the system has in memory; half a second of the processor's time."""
    text = tmp_path / "text"
    text.mkdir()
    for shard in range(3):
        write_parquet(text / f"{shard}.parquet", [text for text in make_texts(shard) if text] * 100)
    prepare(str(text), tmp_path / "tokens", str(tokenizer_path), max_shard_tokens=50_000)
    data = open_kind("tokens", str(tmp_path / "tokens"), None, seq_length=2048, vocab_size=512, seed=0)
    reader = data.train_reader(64, 8, 0, 1)
    best = 0.0
    for _ in range(5):  # other processes may take the cache of the processor
        start, num_tokens = time.process_time(), 0
        while time.process_time() - start < 0.1:
            num_tokens += next(reader).ids.numel()
        best = max(best, num_tokens / (time.process_time() - start))
    assert best > 5e6


@pytest.mark.soak
def test_preparation_costs_little_beside_the_tokenizer(tmp_path):
    """At least three quarters of the speed of SentencePiece alone, in CPU seconds, on a million unseen characters.

    That is little for the memory of words to show: tools/benchmark.py measures on a corpus of the user's.
    """
    make_sample_corpus.main(["--output", str(tmp_path / "text"), "--num-shards", "2"])
    model = ["--output", str(tmp_path / "tokenizer"), "--vocab-size", "8000", "--max-characters", "2000000"]
    train_tokenizer.main(["--input", str(tmp_path / "text"), *model])
    first, second = (replace(s, text_column="content") for s in find_shards(str(tmp_path / "text"), "--input"))
    texts = [document.text for documents in read_patiently(second, "content") for document in documents]
    (tmp_path / "train").mkdir()
    (tmp_path / "validation").mkdir()
    best = {"alone": 0.0, "prepared": 0.0}
    for _ in range(5):
        tokenizer = open_tokenizer(tmp_path / "tokenizer.model")
        options = (tmp_path, tmp_path / "record", tokenizer, 0.005, 2**29, "uint16")
        make_shard(ShardJob(0, first, *options), lambda *_: None)
        start = time.process_time()
        num_tokens = sum(map(len, tokenizer.processor.encode(texts, out_type="numpy", num_threads=1)))
        best["alone"] = max(best["alone"], num_tokens / (time.process_time() - start))
        start = time.process_time()
        make_shard(ShardJob(1, second, *options), lambda *_: None)
        best["prepared"] = max(best["prepared"], num_tokens / (time.process_time() - start))
    assert best["prepared"] > 0.75 * best["alone"]


def test_the_fast_tokenizer_has_the_same_ids(tokenizer_path):
    tokenizer = open_tokenizer(tokenizer_path)
    text = "river stone light garden winter letter é 42"
    assert fast_tokenizer(tokenizer).encode(text).ids == tokenizer.encode([text])[0].tolist()
