"""Run folders with a checkpoint, made without training: all weights are drawn, so that no fault hides in small ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from configs import tiny_config
from megastruct.checkpoint.store import save_checkpoint
from megastruct.config.load import dump_config
from megastruct.config.schema import Config
from megastruct.data import open_tokenizer
from megastruct.models.gpt import GPT
from megastruct.planning.steps import total_steps
from tiny_data import train_model

VOCABULARY = 330  # of the tokenizer
SIZES: dict[str, dict[str, Any]] = {
    "dense": {"structure": "dense", "rank": None},
    "lowrank": {"structure": "lowrank", "rank": 8},
    "blockdense": {"structure": "blockdense", "rank": 8, "nblocks": 2},
    "blockshuffle": {"structure": "blockshuffle", "rank": None, "nblocks": 2},
}


def model_config(folder: Path, structure: str = "lowrank", **sections: dict[str, Any]) -> Config:
    """A tiny decoder with the vocabulary of the tokenizer and a context of 64 tokens."""
    sections["model"] = {"vocab_size": VOCABULARY, **sections.get("model", {})}
    sections["training"] = {"seq_length": 64, **sections.get("training", {})}
    ffn = {**SIZES[structure], "dense_first_block": False, **sections.pop("ffn", {})}
    return tiny_config(run={"folder": str(folder), "name": structure}, ffn=ffn, **sections)


def redraw(model: GPT, seed: int = 0) -> GPT:
    """Draw all parameters anew: matrices with values around 1/sqrt(inputs), norms around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            drawn *= 1.5 * parameter.shape[-1] ** -0.5
        elif name.endswith("weight"):
            drawn = 1 + 0.3 * drawn
        parameter.data.copy_(drawn)
    return model


def saved_run(config: Config, step: int | None = None, tokenizer: Path | None = None, model: GPT | None = None) -> Path:
    """A run folder of `config` with one checkpoint, by default of the last step, and a tokenizer."""
    run = Path(config.run.folder) / config.run.name
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(dump_config(config))
    if tokenizer is None:
        train_model(run / "tokenizer.model")
    else:
        for name, content in open_tokenizer(tokenizer).files.items():
            (run / name).write_bytes(content)
    tensors = {
        f"master.{name}": p.detach() for name, p in (model or redraw(GPT(config, init=False))).named_parameters()
    }
    step = total_steps(config) if step is None else step
    save_checkpoint(run / "checkpoints", step, tensors, {"step": step, "cursor": [[step]]}, keep=9)
    return run
