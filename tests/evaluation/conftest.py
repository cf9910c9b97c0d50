"""Texts with characters of several bytes, their token shards, and runs that evaluate them."""

from __future__ import annotations

import random

import pytest

from megastruct.data.preparation.prepare import prepare
from saved_runs import VALIDATION_FRACTION, Material, run_config, save_run, write_jsonl
from tiny_data import WORDS, train_model


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("evaluation")
    tokenizer = train_model(folder / "tokenizer.model")
    generator = random.Random(0)
    words = [*WORDS, "日本", "naïve", "🙂", "¿"]
    texts = {
        source: [" ".join(generator.choices(words, k=generator.randint(1, 30))) for _ in range(count)]
        for source, count in (("web", 24), ("books", 9))
    }
    material = Material(folder, tokenizer, texts)
    for source in texts:
        path = write_jsonl(material.text(source), [None, *texts[source], ""])
        options = {"validation_fraction": VALIDATION_FRACTION, "max_shard_tokens": 100}
        prepare(str(path), material.tokens(source), str(tokenizer), report=lambda _: None, **options)
    paths = [{"path": str(material.tokens(source)), "weight": 1} for source in texts]
    runs = folder / "runs"
    save_run(run_config(runs, "crossed", data={"path": paths}), tokenizer, steps=(10, 20))
    separate = {"training": {"document_attention": "separate"}, "data": {"path": paths}}
    save_run(run_config(runs, "separate", **separate), tokenizer)
    return material
