"""Run folders with a checkpoint of drawn weights, made without training, and data for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import tiny_config
from megastruct.config.schema import Config
from megastruct.models.gpt import GPT
from trained import redraw, saved_run

SEQ_LENGTH = 16
VOCAB_SIZE = 336  # a few more than the tokenizer has pieces
NUM_STEPS = 20
VALIDATION_FRACTION = 0.3


@dataclass(frozen=True)
class Material:
    """What all tests read: two texts and their token shards, a run whose attention crosses documents, one without."""

    folder: Path
    tokenizer: Path
    texts: dict[str, list[str]]  # by source

    def text(self, source: str) -> Path:
        return self.folder / f"{source}.jsonl"

    def tokens(self, source: str) -> Path:
        return self.folder / source

    def run(self, name: str = "crossed") -> Path:
        return self.folder / "runs" / name


def run_config(folder: Path, name: str, **sections: Any) -> Config:
    """A decoder of two blocks with a context of 16 tokens."""
    sections["model"] = {"vocab_size": VOCAB_SIZE, "num_layers": 2, **sections.get("model", {})}
    sections["training"] = {"seq_length": SEQ_LENGTH, "num_steps": NUM_STEPS, **sections.get("training", {})}
    return tiny_config(run={"folder": str(folder), "name": name}, **sections)


def save_run(config: Config, tokenizer: Path, steps: Sequence[int] = (NUM_STEPS,)) -> Path:
    """The run folder of `config` with a checkpoint of each of `steps`, whose weights differ."""
    for step in steps:
        run = saved_run(config, step, tokenizer, redraw(GPT(config, init=False), step))
    fingerprint = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    data = {"tokenizer_fingerprint": fingerprint, "text_column": "content", "validation_fraction": VALIDATION_FRACTION}
    (run / "data.json").write_text(json.dumps(data))
    return run


def write_jsonl(path: Path, texts: Sequence[str | None], column: str = "content") -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
    return path
