"""A run's state between an engine and a checkpoint: parameters, moments, step, place in the data."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megastruct.checkpoint.sharded import ShardedTensor
from megastruct.checkpoint.store import latest_checkpoint, load_state, load_tensors, save_checkpoint
from megastruct.config.schema import Config
from megastruct.errors import Problem, UserError
from megastruct.training.engine import Engine
from megastruct.training.run_folder import checkpoints_folder, finished_steps
from megastruct.training.state import ParameterState, capture, restore

KINDS = tuple(field.name for field in fields(ParameterState))


def save(engine: Engine, step: int, cursor: np.ndarray, state: dict[str, Any]) -> Path:
    """Write `step`'s checkpoint from all ranks. `cursor`: the whole run's (`gather_cursor`)."""
    parameters = dict(engine.named_parameters())
    tensors = {
        f"{kind}.{name}": _global(engine, parameters[name], getattr(captured, kind))
        for name, captured in capture(engine).items()
        for kind in KINDS
    }
    config = engine.config
    state = {"step": step, "cursor": cursor.tolist(), "layout": config.parallel.model_dump(), **state}
    return save_checkpoint(checkpoints_folder(config), step, tensors, state, config.checkpoint.keep)


def resume(engine: Engine) -> tuple[int, np.ndarray | None]:
    """Load the newest complete checkpoint of the run into the engine: (steps done, cursor), (0, None) without one."""
    folder = latest_checkpoint(checkpoints_folder(engine.config))
    if folder is None:
        return 0, None
    state = load_state(folder)
    local = {
        name: ParameterState(*(torch.empty(getattr(p, "ds_shape", p.shape)) for _ in KINDS))
        for name, p in engine.named_parameters()
    }
    tensors = {
        f"{kind}.{name}": _global(engine, p, getattr(local[name], kind))
        for name, p in engine.named_parameters()
        for kind in KINDS
    }
    load_tensors(folder, tensors)
    restore(engine, local, state["step"])
    return state["step"], np.array(state["cursor"], dtype=np.int64)


def _global(engine: Engine, parameter: nn.Parameter, local: Tensor) -> Tensor:
    """`local` under the global form of its parameter: a view that knows its place, where ranks hold parts."""
    spec = getattr(parameter, "shard_spec", None)
    if spec is None:
        return local
    shape = parameter.global_shape  # type: ignore[attr-defined]
    return ShardedTensor.of(local, shape, spec.boxes(shape, engine.tp.rank))


def agreed_finished_steps(config: Config, device: torch.device) -> int:
    """Steps of the newest checkpoint, after all ranks have found the same. Collective.

    Raises UserError on all ranks if they have not: they would wait for each other until the group's time is out.
    """
    own = torch.tensor([finished_steps(config)], device=device)
    steps = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(steps, own)
    found = sorted({int(step) for step in steps})
    if len(found) > 1:
        message = f"the newest checkpoint is another one on different ranks: steps {found}"
        raise UserError(Problem("run.folder", message, "a folder on a file system that all nodes share"))
    return found[0]


def gather_cursor(engine: Engine, cursor: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """The cursor of the whole run from those of all replicas (None on ranks that read no data). Collective."""
    local = np.full(shape, -1, dtype=np.int64) if cursor is None else cursor
    tensor = torch.from_numpy(local).to(engine.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.cpu().numpy()
