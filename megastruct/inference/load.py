"""A model for one process from a run's checkpoint, whatever layout wrote it."""

from __future__ import annotations

from pathlib import Path

import torch

from megastruct.checkpoint.intact import newest_intact
from megastruct.checkpoint.store import load_state, load_tensors
from megastruct.config.load import load_config
from megastruct.config.schema import Config
from megastruct.errors import Problem, UserError
from megastruct.models.gpt import GPT
from megastruct.planning.steps import guided_steps


def load_model(
    run: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, allow_guided: bool = False
) -> tuple[GPT, Config]:
    """(model in eval mode, the run's config) from the newest intact checkpoint of the run folder `run`.

    The weights are the fp32 masters, cast to `dtype`. Raises UserError without an intact checkpoint, and for one from
    inside the guided phase unless `allow_guided`: then the structured matrices alone are loaded.
    """
    if not (run / "config.yaml").exists():
        raise UserError(
            Problem(str(run), "no run folder (there is no config.yaml)", "the folder that train.py printed")
        )
    config = load_config(run / "config.yaml")
    folder, _ = newest_intact(run / "checkpoints")
    if folder is None:
        raise UserError(Problem(f"{run}/checkpoints", "no complete checkpoint", "train until the first one is saved"))
    step = int(load_state(folder)["step"])
    if step < guided_steps(config) and not allow_guided:
        raise UserError(
            Problem(
                str(folder),
                f"from inside the guided phase (step {step} of {guided_steps(config)}): its structured matrices are "
                "still half-trained, as the dense guides that bear part of the output are no part of the model",
                f"train on past step {guided_steps(config)}; or --allow-guided, to see the structured part alone",
            )
        )
    model = GPT(config)
    load_tensors(folder, {f"master.{name}": parameter.detach() for name, parameter in model.named_parameters()})
    return model.to(device=device, dtype=dtype).eval(), config
