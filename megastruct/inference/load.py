"""A model for one process from a run's checkpoint, whatever layout wrote it."""

from __future__ import annotations

from pathlib import Path

import torch

from megastruct.checkpoint.store import latest_checkpoint, load_tensors
from megastruct.config.load import load_config
from megastruct.config.schema import Config
from megastruct.errors import Problem, UserError
from megastruct.models.gpt import GPT


def load_model(run: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> tuple[GPT, Config]:
    """(model in eval mode, the run's config) from the newest checkpoint of the run folder `run`.

    The weights are the fp32 masters, cast to `dtype`. Raises UserError without a complete checkpoint.
    """
    if not (run / "config.yaml").exists():
        raise UserError(
            Problem(str(run), "no run folder (there is no config.yaml)", "the folder that train.py printed")
        )
    config = load_config(run / "config.yaml")
    folder = latest_checkpoint(run / "checkpoints")
    if folder is None:
        raise UserError(Problem(f"{run}/checkpoints", "no complete checkpoint", "train until the first one is saved"))
    model = GPT(config)
    load_tensors(folder, {f"master.{name}": parameter.detach() for name, parameter in model.named_parameters()})
    return model.to(device=device, dtype=dtype).eval(), config
