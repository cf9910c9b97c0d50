"""Configurations and splits of folders and datasets: chosen, or refused with the list of what there is."""

from __future__ import annotations

import datasets
import pytest

from megastruct.commands import prepare as prepare_data
from megastruct.config.checks import check_data
from megastruct.config.data import DataConfig
from megastruct.data.cache import cached_json, key_of
from megastruct.data.preparation.prepare import prepare
from megastruct.data.sources.choice import Choice
from megastruct.data.sources.find import find_shards
from megastruct.data.tokens.manifest import load_manifest
from megastruct.errors import UserError
from test_places import TEXTS, find, lines_of, message_of, write
from tiny_data import open_kind, write_parquet

CARD = """---
license: odc-by
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample
  data_files: sample/*
- config_name: nested
  data_dir: nested
---
# A dataset
"""


@pytest.fixture
def dataset(tmp_path):
    """Like FineWeb: a default configuration, samples of it, and a third one with splits."""
    names = ["data/2023/0.jsonl", "data/2024/0.jsonl", "sample/0.jsonl"]
    names += ["nested/train/0.jsonl", "nested/validation/0.jsonl"]
    return write(tmp_path / "dataset", {name: lines_of([name]) for name in names} | {"README.md": CARD.encode()})


@pytest.mark.parametrize(
    "choice, names",
    [
        (Choice("default"), ["data/2023/0.jsonl", "data/2024/0.jsonl"]),
        (Choice("sample"), ["sample/0.jsonl"]),
        (Choice("nested", "train"), ["nested/train/0.jsonl"]),
        (Choice("nested", "all"), ["nested/train/0.jsonl", "nested/validation/0.jsonl"]),
        (Choice("default", "train", ("data/2023/",)), ["data/2023/0.jsonl"]),
        (Choice(include=("data/*",)), ["data/2023/0.jsonl", "data/2024/0.jsonl"]),
        (Choice(split="train", include=("nested/*", "sample/*")), ["nested/train/0.jsonl"]),
    ],
)
def test_a_choice_has_the_files_that_datasets_takes(dataset, choice, names):
    corpus = find(dataset, choice)
    assert [shard.name for shard in corpus.shards] == names
    if choice.config and choice.split != "all" and not choice.include:
        loaded = datasets.load_dataset_builder(str(dataset), choice.config).config.data_files
        own = [path.partition("/dataset/")[2] for path in loaded[choice.split or "train"]]
        assert sorted(own) == names
    not_read = 5 - len(names)
    lines = corpus.lines()[1:]
    assert sum(int(line.partition(": ")[2].split()[0]) for line in lines) == not_read + 1  # and the card


@pytest.mark.parametrize(
    "choice, found, suggestion",
    [
        (Choice(), "3 configurations, .*default .its default., sample, nested", "--config default"),
        (Choice("samples"), "no configuration samples; it has: default, sample, nested", "--config sample"),
        (Choice("nested"), r"train \(1 file\), validation \(1 file\)", "--split train, or --split all"),
        (Choice("nested", "dev"), "no split dev; it has: train", "--split train"),
        (Choice(include=("nothing/*",)), "no text shard among the 0 that match files nothing", "end with"),
    ],
)
def test_several_without_a_choice_are_refused_with_the_list(
    dataset, tmp_path, tokenizer_path, choice, found, suggestion
):
    with pytest.raises(UserError, match=rf"(?s)--input: .*{found}.*try: .*{suggestion}"):
        prepare(str(dataset), tmp_path / "out", str(tokenizer_path), choice=choice)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "names, listed",
    [
        (["train/a.jsonl", "validation/b.jsonl"], "train (1 file), validation (1 file)"),
        (["c4-train.0-of-2.json", "c4-train.1-of-2.json", "c4-validation.0-of-1.json"], "train (2 files), validation"),
        (["data/train-00000-of-00001.parquet", "data/odd-00000-of-00001.parquet"], "train (1 file), odd (1 file)"),
        (["train.jsonl", "books.jsonl"], "train (1 file), 1 file of no split (books.jsonl)"),
    ],
)
def test_splits_of_a_folder_without_a_card(tmp_path, names, listed):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith("parquet"):
            write_parquet(tmp_path / name, TEXTS)
        else:
            write(tmp_path, {name: lines_of(TEXTS)})
    message = message_of(find, tmp_path)
    assert listed in message and "--split train" in message and "--split all" in message
    assert len(find(tmp_path, Choice(split="train")).shards) == listed.count("2 files") + 1
    assert [shard.name for shard in find(tmp_path, Choice(split="all")).shards] == sorted(names)
    assert "data.split=train" in message_of(find, tmp_path, where="data.path")
    assert "split: train beside" in message_of(find, tmp_path, where="data.path.1")


def test_names_that_tell_no_splits_are_read_without_a_choice(tmp_path):
    names = ["latest/contest.jsonl", "shard-00001-of-2.jsonl", "value.jsonl"]
    write(tmp_path, {name: lines_of(TEXTS) for name in names})
    assert [shard.name for shard in find(tmp_path).shards] == names
    for pattern in ("*.jsonl", "**/*.jsonl"):
        assert find(tmp_path / pattern).shards
    write(tmp_path, {"train.jsonl": lines_of(TEXTS), "validation.jsonl": lines_of(TEXTS)})
    assert len(find(tmp_path / "*n.jsonl").shards) == 2  # the user gave the files


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nconfigs:\n- config_name: en\n   data_files: en/*\n---\n", "not valid: mapping values are not allowed"),
        ("---\nconfigs:\n- data_files: en/*\n---\n", "not valid: a configuration without config_name"),
        (
            "\ufeff\n---\nconfigs:\n- {config_name: en, data_files: en/*}\n- {config_name: de}\n---\n",
            "2 configurations",
        ),
    ],
)
def test_configurations_of_a_card_are_not_passed_over(tmp_path, card, found):
    """Or all of the files would be read."""
    write(tmp_path, {"README.md": card.encode(), "en/a.jsonl": lines_of(TEXTS), "de/b.jsonl": lines_of(TEXTS)})
    assert found in message_of(find, tmp_path)


@pytest.mark.parametrize("card", ["---\nconfigs: 3\n---\n", "---\n[: x\n---\n", "# no front matter", ""])
def test_a_card_without_configurations_is_no_obstacle(tmp_path, card):
    write(tmp_path, {"README.md": card.encode(), "a.jsonl": lines_of(TEXTS)})
    assert len(find(tmp_path).shards) == 1
    message = message_of(find, tmp_path, Choice("en"))
    assert "has no configurations" in message


@pytest.mark.parametrize("files", ["[{split: train}]", "3", "[{split: train, path: [1]}]"])
def test_a_card_that_datasets_refuses_is_a_message(tmp_path, files):
    entry = f"{{config_name: en, data_files: {files}}}"
    write(tmp_path, {"README.md": f"---\nconfigs: [{entry}]\n---".encode(), "a.jsonl": lines_of(TEXTS)})
    assert "dataset card" in message_of(find, tmp_path)


def test_a_validation_split_is_held_out_and_nothing_else(tmp_path, tokenizer_path, capsys):
    folder = write(tmp_path / "text", {"train/a.jsonl": lines_of(TEXTS[:8]), "validation/b.jsonl": lines_of(TEXTS[8:])})
    common = ["--input", str(folder), "--output", f"{tmp_path}/out", "--tokenizer", str(tokenizer_path)]
    chosen = ["--split", "train", "--validation-split", "validation"]
    with pytest.raises(SystemExit):
        prepare_data.main([*common, *chosen, "--validation-fraction", "0.1"])
    assert "give one of the two" in capsys.readouterr().err and not (tmp_path / "out").exists()
    prepare_data.main([*common, *chosen])
    assert "held out: reading" in capsys.readouterr().out
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.totals.train.num_documents, manifest.totals.validation.num_documents) == (8, 4)
    assert [source.held_out for source in manifest.settings.sources] == [False, True]
    assert manifest.settings.validation_fraction == 0

    options = {"seq_length": 8, "vocab_size": 512, "seed": 0}
    keys = {"split": "train", "validation_split": "validation"}
    text = open_kind("text", str(folder), tokenizer_path, **options, **keys)
    tokens = open_kind("tokens", str(tmp_path / "out"), None, **options)
    held_out = [[b.ids.tolist() for b in data.validation_batches(4, 4, 0, 1)] for data in (text, tokens)]
    assert held_out[0] == held_out[1]
    assert text.describe()["held_out_bytes"] == [(folder / "validation" / "b.jsonl").stat().st_size]
    message = message_of(find, folder, Choice(split="all"), validation_split="validation")
    assert "trained on and held out" in message


def test_choices_are_for_text_only():
    class Config:
        data = DataConfig(kind="tokens", path="x", split="train", include="*.bin")

    assert [problem.where for problem in check_data(Config)] == ["data.split", "data.include"]


def test_an_old_cache_of_the_hub_is_still_read(tmp_path):
    """A run that began before notes were stored."""
    old = [["hf://datasets/org/name@abc/a.parquet", "a.parquet", 5, "id"]]
    cached_json(tmp_path / "cache", f"hub-{key_of('org/name')}", lambda: old)
    [shard] = find_shards("org/name", "data.path", cache_folder=tmp_path / "cache")
    assert (shard.name, shard.num_bytes, shard.content_id) == ("a.parquet", 5, "id")
