"""Attention inside of documents in whole runs: the end token is the tokenizer's, for both kinds of data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forked import train_forked
from marks import soak
from megastruct.config import load_config
from megastruct.config.schema import Config
from megastruct.data import open_data, open_tokenizer
from megastruct.data.options import DataOptions
from megastruct.models.gpt import GPT
from megastruct.models.loss import cross_entropy
from processes import Corpus, read_metrics


@torch.no_grad()
def first_loss(config: Config, eod_id: int | None) -> float:
    """Of the first step, by the model alone."""
    training = config.training
    batch = next(
        open_data(DataOptions.of(config)).train_reader(training.global_batch_size, training.global_batch_size, 0, 1)
    )
    return float(cross_entropy(GPT(config, eod_id=eod_id)(batch.ids), batch.labels))


@pytest.mark.parametrize("kind", [soak("tokens"), "text"])
def test_a_run_with_separate_documents(config: Path, tmp_path: Path, corpus: Corpus, kind: str) -> None:
    # A wide start, so that what attention sees shows in the first loss.
    overrides = ["training.document_attention=separate", "training.num_steps=2", "model.init_std=0.3"]
    overrides += ["checkpoint.interval_steps=2", "evaluation.interval_steps=2"]
    if kind == "text":
        overrides += ["data.kind=text", f"data.path={corpus.text}", f"data.tokenizer={corpus.tokenizer}"]
        train_forked(tmp_path, tmp_path / "runs" / "test", 1, config, *overrides, "data.validation_fraction=0.1")
    else:
        train_forked(tmp_path, tmp_path / "runs" / "test", 2, config, *overrides, "parallel.pp=2")
    run = tmp_path / "runs" / "test"
    records = read_metrics(run)
    resolved = load_config(run / "config.yaml")
    separate = first_loss(resolved, open_tokenizer(corpus.tokenizer).eod_id)
    assert abs(separate - first_loss(resolved, None)) > 1e-2
    assert records[0]["loss"] == pytest.approx(separate, abs=1e-5)
    assert "validation_loss" in records[-1]
