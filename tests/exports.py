"""Models with all weights drawn at a large scale: on small first weights a wrong activation changes the logits by 1e-5
only, and a permuted head not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from configs import tiny_config
from megastruct.config.schema import Config
from megastruct.data import open_tokenizer
from megastruct.data.preparation.tokenizer import TRAINING_OPTIONS
from megastruct.huggingface.export import Trained
from megastruct.models.gpt import GPT
from tiny_data import train_model
from trained import redraw

VOCABULARY = 330  # of the tokenizer
# The bound of all comparisons with transformers in float32, relative to the largest logit. Measured: at most 6e-6.
BOUND = 1e-5

STRUCTURES: dict[str, dict[str, Any]] = {
    "dense": {"structure": "dense", "rank": None},
    "lowrank": {"structure": "lowrank", "rank": 8},
    "blockdense": {"structure": "blockdense", "rank": 8, "nblocks": 2},
    "blockshuffle": {"structure": "blockshuffle", "rank": None, "nblocks": 4},
}


def llama_tokenizer(path: Path) -> Path:
    return train_model(path, vocab_size=VOCABULARY, **TRAINING_OPTIONS)


def exported_config(structure: str = "lowrank", model: dict[str, Any] | None = None, **sections: Any) -> Config:
    model = {"num_layers": 2, "vocab_size": VOCABULARY} | (model or {})
    training = {"seq_length": 64} | sections.pop("training", {})
    ffn = STRUCTURES[structure] | {"dense_first_block": False} | sections.pop("ffn", {})
    return tiny_config(model=model, ffn=ffn, training=training, **sections)


def drawn(folder: Path, tokenizer: Path, config: Config) -> Trained:
    """A model that was never trained, in place of a run folder without metrics."""
    return Trained(folder, 20, redraw(GPT(config, init=False).eval()), open_tokenizer(tokenizer), config)


def error(theirs: Tensor, ours: Tensor) -> float:
    """The largest difference of logits [..., v], relative to the largest logit."""
    return float((theirs - ours).abs().max() / ours.abs().max())
