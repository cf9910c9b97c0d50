"""A run's state between an engine and a checkpoint: parameters, moments, step, place in the data."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megastruct.checkpoint.store import latest_checkpoint, load_state, load_tensors, save_checkpoint
from megastruct.training.engine import Engine
from megastruct.training.run_folder import checkpoints_folder
from megastruct.training.state import ParameterState, capture, restore

KINDS = tuple(field.name for field in fields(ParameterState))


def save(engine: Engine, step: int, cursor: np.ndarray, state: dict[str, Any]) -> Path:
    """Write `step`'s checkpoint from all ranks. `cursor`: the whole run's (`gather_cursor`)."""
    tensors = {f"{kind}.{name}": getattr(s, kind) for name, s in capture(engine).items() for kind in KINDS}
    config = engine.config
    state = {"step": step, "cursor": cursor.tolist(), "layout": config.parallel.model_dump(), **state}
    return save_checkpoint(checkpoints_folder(config), step, tensors, state, config.checkpoint.keep)


def resume(engine: Engine) -> tuple[int, np.ndarray | None]:
    """Load the newest complete checkpoint of the run into the engine: (steps done, cursor), (0, None) without one."""
    folder = latest_checkpoint(checkpoints_folder(engine.config))
    if folder is None:
        return 0, None
    state = load_state(folder)
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in engine.named_parameters()}
    tensors: dict[str, Tensor] = {f"{kind}.{n}": torch.empty(shape) for n, shape in shapes.items() for kind in KINDS}
    load_tensors(folder, tensors)
    parameters = {name: ParameterState(*(tensors[f"{kind}.{name}"] for kind in KINDS)) for name in shapes}
    restore(engine, parameters, state["step"])
    return state["step"], np.array(state["cursor"], dtype=np.int64)


def gather_cursor(engine: Engine, cursor: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """The cursor of the whole run from those of all replicas (None on ranks that read no data). Collective."""
    local = np.full(shape, -1, dtype=np.int64) if cursor is None else cursor
    tensor = torch.from_numpy(local).to(engine.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.cpu().numpy()
