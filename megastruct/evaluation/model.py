"""A trained model, loaded as it is evaluated: with its tokenizer, and with the run's attention to documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch

from megastruct.checkpoint.intact import _damage
from megastruct.checkpoint.store import load_state, load_tensors, step_of
from megastruct.config.load import load_config
from megastruct.config.schema import Config
from megastruct.data import Tokenizer, open_tokenizer
from megastruct.errors import Problem, UserError
from megastruct.inference.load import load_model
from megastruct.models.gpt import GPT
from megastruct.planning.steps import guided_steps
from megastruct.run.run_folder import CONFIG_FILE, DATA_FILE, TOKENIZER_FILE, RunFolder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Loaded(NamedTuple):
    """A trained model in eval mode on its device, its tokenizer, the run's config, and the steps it was trained for."""

    model: GPT
    tokenizer: Tokenizer
    config: Config
    step: int


def load(
    path: Path, device: str | torch.device, dtype: torch.dtype, *, allow_guided: bool = False, tokenizer: Path | None
) -> Loaded:
    """The model of a run folder, or of one of its checkpoint folders. Raises UserError if it cannot be loaded."""
    run = run_of(path)
    if run == path:
        model, config = load_model(run, device, dtype, allow_guided)
        step = RunFolder(config.model_copy(update={"run": config.run.model_copy(update=_place(run))})).finished_steps()
    else:
        config, step = load_config(run / CONFIG_FILE), step_of(path)
        if damage := _damage(path):
            raise UserError(Problem(str(path), f"damaged: {damage}", str(run)), on_all_ranks=True)
        if int(load_state(path)["step"]) < guided_steps(config) and not allow_guided:
            raise UserError(Problem(str(path), "was saved inside the guided phase", "--allow-guided"))
        model = GPT(config)
        load_tensors(path, {f"master.{name}": parameter.detach() for name, parameter in model.named_parameters()})
        model = model.to(device=device, dtype=dtype).eval()
    opened = open_tokenizer(tokenizer or run / TOKENIZER_FILE, "--tokenizer" if tokenizer else "")
    if opened.vocab_size > config.model.vocab_size:
        found = f"has {opened.vocab_size:,} pieces, but the model has {config.model.vocab_size:,} words"
        raise UserError(Problem(str(opened.path), found, f"{run / TOKENIZER_FILE}, the tokenizer of the run"))
    return Loaded(model, opened, config, step)


def _place(run: Path) -> dict[str, str]:
    return {"folder": str(run.parent), "name": run.name}


def run_of(path: Path) -> Path:
    """The run folder of `path`, which is a run folder or one of its checkpoint folders."""
    inside = path.parent.name == "checkpoints" and not (path / CONFIG_FILE).exists()
    return path.parent.parent if inside and path.is_dir() else path


def open_model(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    allow_guided: bool = False,
    tokenizer: str | Path | None = None,
) -> Loaded:
    """The model of a run folder (its newest checkpoint) or of one of its checkpoint folders.

    Tokens see the tokens before them as in training, also where documents are separate. Collective, if
    torch.distributed is in use.

    Raises:
        UserError: there is no intact checkpoint, it is from inside the guided phase and `allow_guided` is false, the
            tokenizer is not the one that the run was trained with, or there is no such device.
    """
    path, given = Path(path).absolute(), Path(tokenizer).absolute() if tokenizer else None
    loaded = load(path, available_device(device), dtype, allow_guided=allow_guided, tokenizer=given)
    _check_tokenizer(loaded.tokenizer, run_of(path))
    if loaded.config.training.document_attention == "separate":
        loaded.model.eod_id = loaded.tokenizer.eod_id
    return loaded


def available_device(wanted: str | torch.device | None) -> torch.device:
    """The device by its name; None: the GPU if there is one. Raises UserError if it is not there."""
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(Problem("--device", f"{wanted} cannot be used: {reason}", "--device cpu")) from None
    return device


def described_data(run: Path) -> dict:
    """What the run's record says of its data; empty if there is no record."""
    try:
        return json.loads((run / DATA_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _check_tokenizer(tokenizer: Tokenizer, run: Path) -> None:
    recorded = described_data(run).get("tokenizer_fingerprint", tokenizer.fingerprint)
    if tokenizer.fingerprint != recorded:
        found = (
            f"is not the tokenizer that {run} was trained with (sha256 {tokenizer.fingerprint[:12]}... instead of "
            f"{recorded[:12]}...)"
        )
        raise UserError(Problem(str(tokenizer.path), found, f"the run's own, {run / TOKENIZER_FILE}"))
