"""A small corpus, its tokenizer and its token shards, made by the tools, and a config that trains on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from processes import Corpus, run_tool, write_config

WORDS = ["the", "of", "and", "to", "in", "is", "was", "he", "for", "it", "with", "as", "his", "on", "be", "at", "by"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: Any) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    text = folder / "text"
    text.mkdir()
    generator = random.Random(0)
    for shard in range(3):
        with (text / f"shard-{shard}.jsonl").open("w") as file:
            file.write(json.dumps({"content": "", "url": "https://example.com/empty"}) + "\n")
            for _ in range(80):
                content = " ".join(generator.choices(WORDS, k=generator.randint(20, 120))) + "."
                file.write(json.dumps({"content": content, "url": "https://example.com"}) + "\n")
    run_tool("train_tokenizer.py", "--input", text, "--output", folder / "tokenizer", "--vocab-size", 320)
    tokenizer, tokens = folder / "tokenizer.model", folder / "tokens"
    run_tool(
        "prepare_data.py", "--input", text, "--output", tokens, "--tokenizer", tokenizer, "--validation-fraction", 0.1
    )
    return Corpus(text, tokenizer, tokens)


@pytest.fixture
def config(tmp_path: Path, corpus: Corpus) -> Path:
    """A run of 12 steps on the token shards."""
    return write_config(tmp_path, corpus)
