"""A run folder with a checkpoint of step 0, from which training starts on any layout."""

from __future__ import annotations

import torch

from megastruct.checkpoint.store import save_checkpoint
from megastruct.config.load import dump_config
from megastruct.data import Tokenizer
from megastruct.engine.optimizer import parameter_roles
from megastruct.errors import Problem, UserError
from megastruct.huggingface.first_weights import FirstWeights
from megastruct.huggingface.folder import new_folder
from megastruct.models.gpt import GPT
from megastruct.models.guidance import is_guide
from megastruct.optimizers import MASTER, OPTIMIZERS
from megastruct.run.origin import write_origin
from megastruct.run.run_folder import CONFIG_FILE, LOCK_FILE, RunFolder


def check_new(run: RunFolder) -> None:
    """Raises UserError if the run was started already; an attempt that ended in its checks leaves a lock only."""
    if run.path.exists() and {path.name for path in run.path.iterdir()} - {LOCK_FILE}:
        found = f"{run.path} is not empty; first weights are for a new run"
        raise UserError(Problem("run.name", found, f"run.name={run.path.name}-2"))


def write_first_checkpoint(run: RunFolder, weights: FirstWeights, tokenizer: Tokenizer, origin: str) -> None:
    """Make the run folder: config, tokenizer and a checkpoint with these weights and zeros as the optimizer's state.

    `origin`: where the weights come from, for the record of the run. Raises UserError if the disk refuses it; then
    there is no run folder.
    """
    config = run.config
    with torch.device("meta"):
        roles = parameter_roles(model := GPT(config, init=False))
    groups = {name: roles[parameter] for name, parameter in model.named_parameters()}
    groups |= {name: "guide" for name in weights.tensors if is_guide(name)}
    assert groups.keys() == weights.tensors.keys()
    tensors = {}
    for name, weight in weights.tensors.items():
        tensors[f"{MASTER}.{name}"] = weight
        for kind in OPTIMIZERS[config.optimizer.kind].group_of(groups[name]).state:
            tensors[f"{kind}.{name}"] = torch.zeros_like(weight)
    state = {"step": 0, "cursor": [], "optimizer": config.optimizer.kind, "first_weights": origin}
    with new_folder(run.path) as folder:
        (folder / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
        for name, content in tokenizer.files.items():
            (folder / name).write_bytes(content)
        write_origin(folder, {"kind": "huggingface", "folder": origin})
        save_checkpoint(folder / run.checkpoints.name, 0, tensors, state, keep=1)
        (run.path / LOCK_FILE).unlink(missing_ok=True)
