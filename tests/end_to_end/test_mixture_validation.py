"""The validation loss of each source in the metrics of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from forked import train_forked
from megastruct.config.load import load_config
from megastruct.data import open_data
from megastruct.data.options import DataOptions
from megastruct.run.validation import Validation
from processes import Corpus, read_metrics, run_tool

ARGUMENTS = ("training.num_steps=2", "evaluation.interval_steps=1", "evaluation.num_samples=12")


@pytest.fixture(scope="module")
def mixture(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The corpus and one of its shards, in a mixture of 2 : 1."""
    folder = tmp_path_factory.mktemp("sources")
    options = ("--tokenizer", corpus.tokenizer, "--validation-fraction", 0.1)
    run_tool("prepare_data.py", "--input", corpus.text / "shard-1.jsonl", "--output", folder / "books", *options)
    return f"data.path=[{{path: {corpus.tokens}, weight: 2}}, {{path: {folder / 'books'}, weight: 1}}]"


def test_each_source_has_its_loss(config: Path, tmp_path: Path, mixture: str) -> None:
    runs = tmp_path / "runs"
    train_forked(tmp_path, runs / "one", 1, config, mixture, "run.name=one", *ARGUMENTS)
    train_forked(
        tmp_path, runs / "many", 4, config, mixture, "run.name=many", "parallel.pp=2", "parallel.tp=2", *ARGUMENTS
    )
    one, many = (
        [{key: value for key, value in record.items() if key.startswith("validation_loss")} for record in records]
        for records in (read_metrics(runs / "one"), read_metrics(runs / "many"))
    )
    assert [list(record) for record in one] == [
        ["validation_loss", "validation_loss/tokens", "validation_loss/books"]
    ] * 2
    for first, second in zip(one, many, strict=True):
        assert first == pytest.approx(second, rel=1e-5)
        tokens, books = first["validation_loss/tokens"], first["validation_loss/books"]
        assert first["validation_loss"] == pytest.approx((8 * tokens + 4 * books) / 12, rel=1e-6)
        assert abs(tokens - books) > 1e-4
    assert one[0] != one[1]
    board = EventAccumulator(str(runs / "one")).Reload()
    shown = [event.value for event in board.Scalars("1_loss/validation_of_books")]
    assert shown == pytest.approx([record["validation_loss/books"] for record in one])


def test_rows_are_told_apart_by_their_source(config: Path, mixture: str) -> None:
    """A source's rows in the mixture are the first rows of that source alone."""
    loaded = load_config(config, [mixture])
    data = open_data(DataOptions.of(loaded))
    for index, (name, (path, _)) in enumerate(zip(("tokens", "books"), loaded.data.sources, strict=True)):
        alone = open_data(DataOptions.of(load_config(config, [f"data.path={path}"])))
        wanted = [batch.ids[0].tolist() for batch in alone.validation_batches((8, 4)[index], 1, 0, 1)]
        found = {}
        for rank in range(3):
            masks = data.validation_sources(12, 2, rank, 3)
            assert list(masks) == ["tokens", "books"]
            for place, batch in enumerate(data.validation_batches(12, 2, rank, 3)):
                for row, chosen in enumerate(masks[name][place]):
                    if chosen:
                        found[place * 6 + rank * 2 + row] = batch.ids[row].tolist()
        assert [found[sample] for sample in sorted(found)] == wanted


def test_a_run_of_one_source_records_no_rows(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the sources of a single source were asked for")

    monkeypatch.setattr(Validation, "_source_losses", refuse)
    train_forked(tmp_path, tmp_path / "runs" / "test", 1, config, *ARGUMENTS, "logging.interval_steps=2")
    records = read_metrics(tmp_path / "runs" / "test")
    keys = {key for record in records for key in record}
    assert "loss" not in records[0] and 2 * records[0]["tokens"] == records[1]["tokens"]
    assert 2 * records[0]["training_flops"] == records[1]["training_flops"]
    assert 0 < records[0]["wall_time_seconds"] < records[1]["wall_time_seconds"]
    assert not any(key.startswith("validation_loss/") for key in keys) and "validation_loss" in keys
