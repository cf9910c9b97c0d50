"""The two small tools: a corpus without a download, and a tokenizer trained on it."""

import functools
import json

import pyarrow.parquet as pq
import pytest

from megastruct.commands import make_sample_corpus, train_tokenizer
from megastruct.data import open_tokenizer
from megastruct.data.preparation import sample_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "c"
    # the sources of the standard library take seconds to parse: once is enough
    sample_corpus.collect_documents = functools.cache(sample_corpus.collect_documents)
    make_sample_corpus.main(["--output", str(folder), "--num-shards", "3"])
    return folder


def fails(main, arguments, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_corpus_is_refined_webs_schema_and_real_text(corpus):
    tables = [pq.read_table(path) for path in sorted(corpus.glob("*.parquet"))]
    assert len(tables) == 3
    for table in tables:
        assert table.column_names == ["content", "url", "timestamp", "dump", "segment", "image_urls"]
    texts = [text for table in tables for text in table["content"].to_pylist()]
    assert len(set(texts)) == len(texts) > 300
    assert sum(map(len, texts)) > 1_500_000
    assert min(map(len, texts)) >= sample_corpus.MIN_DOCUMENT_CHARACTERS


def test_corpus_again(corpus, tmp_path, capsys):
    make_sample_corpus.main(["--output", str(corpus), "--num-shards", "3"])
    assert "already done" in capsys.readouterr().out
    make_sample_corpus.main(["--output", str(tmp_path / "jsonl"), "--num-shards", "3", "--format", "jsonl"])
    for path in sorted(corpus.glob("*.parquet")):
        lines = (tmp_path / "jsonl" / f"{path.stem}.jsonl").read_text().splitlines()
        assert [json.loads(line)["content"] for line in lines] == pq.read_table(path)["content"].to_pylist()
    assert "made with" in fails(make_sample_corpus.main, ["--output", corpus, "--num-shards", "2"], capsys)
    (tmp_path / "thesis.txt").write_text("x")
    assert "other files" in fails(make_sample_corpus.main, ["--output", tmp_path], capsys)
    assert "--num-shards" in fails(make_sample_corpus.main, ["--output", tmp_path / "n", "--num-shards", "0"], capsys)


def test_tokenizer_is_like_llamas_and_deterministic(corpus, tmp_path, capsys):
    options = ["--input", str(corpus), "--vocab-size", "700", "--max-characters", "300000"]
    train_tokenizer.main([*options, "--output", f"{tmp_path}/a/"])
    train_tokenizer.main([*options, "--output", str(tmp_path / "b")])
    path = tmp_path / "a" / "tokenizer.model"
    assert path.read_bytes() == (tmp_path / "b.model").read_bytes()
    tokenizer = open_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (700, 2)
    text = "Keep  every\n\tcharacter: é 日 🙂 12"
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text
    english = "The function returns a list of the values in the dictionary."
    assert len(tokenizer.encode([english])[0]) < len(english) / 2

    capsys.readouterr()
    train_tokenizer.main([*options, "--output", str(tmp_path / "a")])
    assert "already done" in capsys.readouterr().out
    error = fails(train_tokenizer.main, [*options, "--vocab-size", "701", "--output", tmp_path / "a"], capsys)
    assert "vocab_size" in error
    (tmp_path / "mine.model").write_text("precious")
    assert "mine.model" in fails(train_tokenizer.main, [*options, "--output", tmp_path / "mine"], capsys)


@pytest.mark.parametrize("vocab_size", [60, 2_000_000])
def test_vocabulary_that_does_not_fit_names_one_that_does(corpus, tmp_path, capsys, vocab_size):
    options = ["--input", corpus, "--max-characters", "30000", "--output", tmp_path / "x"]
    error = fails(train_tokenizer.main, [*options, "--vocab-size", vocab_size], capsys)
    works = error.split("try: --vocab-size ")[1].split()[0]
    train_tokenizer.main([*map(str, options), "--vocab-size", works])
    assert open_tokenizer(tmp_path / "x.model").vocab_size == int(works)


def test_bad_options(corpus, tmp_path, capsys):
    options = ["--output", tmp_path / "x", "--vocab-size", "700"]
    assert "--input" in fails(train_tokenizer.main, [*options, "--input", tmp_path / "none"], capsys)
    assert "--vocab-size" in fails(
        train_tokenizer.main, ["--input", corpus, "--output", "x", "--vocab-size", 0], capsys
    )
    missing = [*options, "--input", corpus, "--text-column", "nope"]
    assert "the columns are: content, url" in fails(train_tokenizer.main, missing, capsys)
