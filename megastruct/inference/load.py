"""Load a run's checkpoint into a model in one process, whatever parallel layout wrote it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch

from megastruct.checkpoint.reading import SafeFileSystemReader
from megastruct.checkpoint.store import load_state, load_tensors, step_of
from megastruct.config.load import load_config
from megastruct.config.schema import Config
from megastruct.data import Tokenizer, open_tokenizer
from megastruct.data.options import tokenizer_options_of
from megastruct.data.tokenizers.options import OPTIONS_FILE, options_beside
from megastruct.errors import Problem, UserError
from megastruct.inference.forms import Form, use_form
from megastruct.models.gpt import GPT
from megastruct.models.guidance import is_guide
from megastruct.optimizers import MASTER
from megastruct.planning.steps import guided_steps
from megastruct.run.find import find_checkpoint
from megastruct.run.run_folder import CONFIG_FILE, read_description

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of weights, by the names that programs take


class Loaded(NamedTuple):
    """A trained model.

    Attributes:
        model: in eval mode, on its device.
        tokenizer: the run's own, or the one that was asked for.
        config: the run's.
        step: finished training steps of the checkpoint.
    """

    model: GPT
    tokenizer: Tokenizer
    config: Config
    step: int


def load(
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    *,
    form: Form = "structured",
    tokenizer: str | os.PathLike[str] | None = None,
    allow_guided: bool = False,
) -> Loaded:
    """The model, tokenizer, config and step of a run folder, or of one checkpoint folder in it.

    Of a run folder, the newest intact checkpoint is loaded. The weights are the fp32 master weights, cast to `dtype`.
    Guides are never loaded: with `allow_guided`, a checkpoint from inside the guided phase gives the structured
    matrices alone.

    Args:
        path: a run folder, such as `runs/quickstart`, or `RUN/checkpoints/NAME`.
        device: where the model goes; None: the GPU if there is one.
        dtype: of the weights; also by its name, such as "bfloat16".
        form: how structured linears are computed, see `forms.use_form`.
        tokenizer: a tokenizer file instead of the run's own.
        allow_guided: load a checkpoint from inside the guided phase.

    Raises:
        UserError: there is no run or intact checkpoint, the checkpoint is from inside the guided phase and
            `allow_guided` is false, it has weights that the config's model lacks, the tokenizer is not the run's, or
            there is no such device or dtype.
    """
    run, checkpoint = find_checkpoint(path)
    config = load_config(run / CONFIG_FILE)
    opened = _open_tokenizer(run, tokenizer, config)
    if opened.vocab_size > config.model.vocab_size:
        found = f"has {opened.vocab_size:,} pieces, but the model has {config.model.vocab_size:,} words"
        raise UserError(Problem(str(opened.path), found, f"leave --tokenizer out: {run} has its own"))
    if (recorded := read_description(run).get("tokenizer_fingerprint", opened.fingerprint)) != opened.fingerprint:
        found = (
            f"is not the tokenizer that {run} was trained with (sha256 {opened.fingerprint[:12]}... instead of "
            f"{recorded[:12]}...)"
        )
        raise UserError(Problem(str(opened.path), found, f"leave --tokenizer out: {run} has its own"))
    model = _read(checkpoint, config, device, dtype, form, allow_guided)
    return Loaded(model, opened, config, step_of(checkpoint))


def _open_tokenizer(run: Path, given: str | os.PathLike[str] | None, config: Config) -> Tokenizer:
    """The given tokenizer, with the ends of documents that the run has, or else the run's own."""
    if given is None:
        return open_tokenizer(run)
    options = tokenizer_options_of(config.data).over(options_beside(run / OPTIONS_FILE))
    try:
        return open_tokenizer(Path(given), "--tokenizer", options)
    except UserError:  # another tokenizer need not have these tokens; `load` compares
        return open_tokenizer(Path(given), "--tokenizer")


def load_model(
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    *,
    form: Form = "structured",
    allow_guided: bool = False,
) -> tuple[GPT, Config]:
    """The model and config alone, as `load` returns them; for runs whose tokenizer is not needed."""
    run, checkpoint = find_checkpoint(path)
    config = load_config(run / CONFIG_FILE)
    return _read(checkpoint, config, device, dtype, form, allow_guided), config


def _read(
    checkpoint: Path,
    config: Config,
    device: str | torch.device | None,
    dtype: torch.dtype | str,
    form: Form,
    allow_guided: bool,
) -> GPT:
    target, kind = available_device(device), _dtype(dtype)
    step = int(load_state(checkpoint)["step"])
    if step < guided_steps(config) and not allow_guided:
        raise UserError(
            Problem(
                str(checkpoint),
                f"was saved inside the guided phase (step {step} of {guided_steps(config)}): dense guides, which are "
                "not part of the final model, still produce part of the output",
                f"train past step {guided_steps(config)}, or give --allow-guided to use the structured matrices alone",
            )
        )
    model = GPT(config, init=False)
    tensors = {f"{MASTER}.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    load_tensors(checkpoint, tensors)
    _refuse_other_weights(checkpoint, set(tensors))
    # Merged on the device, which is fast, and from the fp32 weights, which is exact.
    use_form(model.to(target).eval().requires_grad_(False), form, kind)
    return model.to(kind)


def _refuse_other_weights(checkpoint: Path, wanted: set[str]) -> None:
    """Raises UserError if the checkpoint has weights that the model lacks, other than guides."""
    stored = SafeFileSystemReader(checkpoint).read_metadata().state_dict_metadata
    other = sorted(name for name in stored if name.startswith(f"{MASTER}.") and not {name} & wanted)
    if other := [name for name in other if not is_guide(name)]:
        found = f"has {len(other)} weights that the model of {CONFIG_FILE} lacks, such as {other[0]}"
        raise UserError(Problem(str(checkpoint), found, f"the {CONFIG_FILE} with which the run was trained"))


def _dtype(wanted: torch.dtype | str) -> torch.dtype:
    dtype = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(Problem("--dtype", f"{wanted!r} is no dtype of weights", f"one of {', '.join(DTYPES)}"))
    return dtype


def available_device(wanted: str | torch.device | None) -> torch.device:
    """The device by its name; None: the GPU if there is one. Raises UserError if it is not there."""
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        if device.type == "meta":
            raise RuntimeError("its tensors have no values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(Problem("--device", f"{wanted} cannot be used: {reason}", "--device cpu")) from None
    return device
