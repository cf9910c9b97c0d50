"""The benchmark of the data room measures all ways on the same text."""

import re

import pytest

from tools import benchmark


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


def test_the_fast_tokenizer_has_the_same_ids(tokenizer_path):
    pytest.importorskip("tokenizers")
    from megastruct.benchmarks.data import fast_tokenizer
    from megastruct.data import Tokenizer

    tokenizer = Tokenizer(tokenizer_path)
    text = "river stone light garden winter letter é 42"
    assert fast_tokenizer(tokenizer).encode(text).ids == tokenizer.encode([text])[0].tolist()
