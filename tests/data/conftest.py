"""A tiny corpus (six parquet shards with broken documents in them), a tokenizer and token shards made from it."""

import pytest

from megastruct.data.preparation.prepare import prepare
from tiny_data import NUM_SHARDS, VALIDATION_FRACTION, make_texts, train_model, write_parquet


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    return train_model(tmp_path_factory.mktemp("tokenizer") / "tiny.model")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for shard in range(NUM_SHARDS):
        write_parquet(folder / f"shard-{shard}.parquet", make_texts(shard))
    return folder


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory, text_folder, tokenizer_path):
    folder = tmp_path_factory.mktemp("made") / "tokens"
    prepare(
        str(text_folder),
        folder,
        str(tokenizer_path),
        validation_fraction=VALIDATION_FRACTION,
        max_shard_tokens=1000,
    )
    return folder
