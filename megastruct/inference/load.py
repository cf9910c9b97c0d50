"""Load a run's checkpoint into a model in one process, whatever parallel layout wrote it."""

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

    The weights are the fp32 master weights, cast to `dtype`. Guides are never loaded: with `allow_guided`, a checkpoint
    from inside the guided phase gives the structured matrices alone.

    Raises:
        UserError: `run` has no config or no intact checkpoint, or the checkpoint is from inside the guided phase and
            `allow_guided` is false.
    """
    if not (run / "config.yaml").exists():
        raise UserError(
            Problem(str(run), "is not a run folder (it has no config.yaml)", "give the folder that train.py printed")
        )
    config = load_config(run / "config.yaml")
    folder, _ = newest_intact(run / "checkpoints")
    if folder is None:
        raise UserError(
            Problem(f"{run}/checkpoints", "has no complete checkpoint", "train until the first one is saved")
        )
    step = int(load_state(folder)["step"])
    if step < guided_steps(config) and not allow_guided:
        raise UserError(
            Problem(
                str(folder),
                f"was saved inside the guided phase (step {step} of {guided_steps(config)}): dense guides, which are "
                "not part of the final model, still produce part of the output",
                f"train past step {guided_steps(config)}, or give --allow-guided to use the structured matrices alone",
            )
        )
    model = GPT(config)
    load_tensors(folder, {f"master.{name}": parameter.detach() for name, parameter in model.named_parameters()})
    return model.to(device=device, dtype=dtype).eval(), config
