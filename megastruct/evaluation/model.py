"""A trained model, loaded as it is evaluated: with the run's attention to documents."""

from __future__ import annotations

from pathlib import Path

import torch

from megastruct.inference.load import Loaded, load


def open_model(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    allow_guided: bool = False,
    tokenizer: str | Path | None = None,
) -> Loaded:
    """The model of a run folder (its newest checkpoint) or of one of its checkpoint folders, as `load` returns it.

    Tokens see the tokens before them as in training, also where documents are separate. Collective, if
    torch.distributed is in use. Raises UserError as `load` does.
    """
    loaded = load(path, device, dtype, tokenizer=tokenizer, allow_guided=allow_guided)
    if loaded.config.training.document_attention == "separate":
        loaded.model.eod_id = loaded.tokenizer.eod_id
    return loaded
