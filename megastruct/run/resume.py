"""A run's state between an engine and a checkpoint: parameters, moments, step, place in the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megastruct.checkpoint.agreement import from_first_rank, gather, together
from megastruct.checkpoint.background import BackgroundSaver
from megastruct.checkpoint.intact import newest_intact, set_aside
from megastruct.checkpoint.sharded import ShardedTensor
from megastruct.checkpoint.store import checkpoint_folder, load_state, load_tensors, save_checkpoint
from megastruct.config.schema import Config
from megastruct.engine.engine import Engine
from megastruct.engine.state import KINDS, Fragment, begin_restore, finish_restore, saved_fragments
from megastruct.errors import Problem, UserError
from megastruct.models.guidance import is_guide
from megastruct.parallel.shards import Box
from megastruct.planning.steps import guided_steps
from megastruct.run.run_folder import checkpoints_folder, finished_steps

_SAVER = BackgroundSaver()  # of the process: a save outlives the engine that it came from


def start_save(
    engine: Engine,
    step: int,
    cursor: np.ndarray,
    state: dict[str, Any],
) -> None:
    """Copy `step`'s state to host memory and write it while training goes on. Collective over the world.

    `cursor`: the whole run's (`gather_cursor`). From the end of the guided phase on the guides are left out.
    Waits for the save before. Raises UserError on all ranks if that one could not be written.
    """
    guided = step < guided_steps(engine.config)
    names = [name for name, _ in engine.named_parameters() if guided or not is_guide(name)]
    owned = {own.name: own for own in saved_fragments(engine) if own.name in names}
    views = {f"{kind}.{name}": tensor for name, own in owned.items() for kind, tensor in own.tensors.items()}
    copies = _SAVER.host_copies(views)
    tensors = {
        f"{kind}.{name}": _global(engine, fragment, copies[f"{kind}.{name}"])
        for name, fragment in owned.items()
        for kind in fragment.tensors
    }
    config = engine.config
    state = {"step": step, "cursor": cursor.tolist(), "layout": config.parallel.model_dump(), **state}
    root, keep = checkpoints_folder(config), config.checkpoint.keep
    wanted = [f"{kind}.{name}" for name in names for kind in KINDS]
    _SAVER.start(lambda group: save_checkpoint(root, step, tensors, state, keep, group, wanted))


def finish_save() -> None:
    """Wait for the save that is on its way. Raises UserError on all ranks if it could not be written."""
    _SAVER.wait()


def save(engine: Engine, step: int, cursor: np.ndarray, state: dict[str, Any]) -> Path:
    """`start_save` and `finish_save`: the checkpoint is complete when it returns."""
    start_save(engine, step, cursor, state)
    finish_save()
    return checkpoint_folder(checkpoints_folder(engine.config), step)


def find_checkpoint(config: Config) -> Path | None:
    """The run's newest intact checkpoint, if there is one; damaged ones that are newer are set aside. Collective.

    Raises UserError on all ranks if there are checkpoints and none is intact.
    """
    finish_save()
    _SAVER.connect()
    folder, damaged = newest_intact(checkpoints_folder(config))
    set_aside(damaged)
    return folder


def resume(engine: Engine, folder: Path | None) -> tuple[int, np.ndarray | None, dict[str, Any]]:
    """Load a checkpoint into the engine: (steps done, cursor, state); (0, None, {}) without a folder. Collective.

    What the engine has no parameter for may be stored, too. Raises UserError on all ranks if it does not fit the model.
    """
    if folder is None:
        return 0, None, {}
    state = together(lambda: load_state(folder))
    tensors = {
        f"{kind}.{name}": _global(engine, fragment, tensor)
        for name, fragment in begin_restore(engine, state["step"], state.get("skipped_steps", 0)).items()
        for kind, tensor in fragment.tensors.items()
    }
    together(lambda: load_tensors(folder, tensors))
    finish_restore(engine)
    return state["step"], np.array(state["cursor"], dtype=np.int64), state


def _global(engine: Engine, fragment: Fragment, tensor: Tensor) -> Tensor:
    """`tensor`, which has the fragment's elements, under the global form of its parameter."""
    parameter: Any = fragment.parameter
    local_shape = getattr(parameter, "ds_shape", parameter.shape)
    spec = getattr(parameter, "shard_spec", None)
    if spec is None:
        origin = (0,) * len(local_shape)
        return ShardedTensor.of_fragment(
            tensor, fragment.start, local_shape, local_shape, [Box(origin, origin, tuple(local_shape))]
        )
    shape = parameter.global_shape
    return ShardedTensor.of_fragment(tensor, fragment.start, local_shape, shape, spec.boxes(shape, engine.tp.rank))


def agreed_finished_steps(config: Config) -> int:
    """Steps of the newest checkpoint, after all ranks have found it. Collective.

    Raises UserError on all ranks if they have not: they would wait for each other until the group's time is out.
    """
    steps = from_first_rank(finished_steps(config))
    sees = not steps or checkpoint_folder(checkpoints_folder(config), steps).is_dir()
    blind = [rank for rank, seen in enumerate(gather(sees)) if not seen]
    if blind:
        message = f"rank {blind[0]} does not see the checkpoint of step {steps} that rank 0 sees"
        suggestion = "a folder on a file system that all nodes share"
        raise UserError(Problem("run.folder", message, suggestion), on_all_ranks=True)
    return steps


def check_same_data(data: dict[str, Any]) -> None:
    """Compare the description of the data over all ranks. Collective. Raises UserError on all ranks if one differs."""
    first, *others = gather(data)
    for rank, other in enumerate(others, 1):
        for key in first:
            if other.get(key) != first[key]:
                found = f"rank {rank} sees {key} = {other.get(key)!r}, rank 0 {first[key]!r}"
                suggestion = "the same files on all nodes; of a hub's dataset ORG/NAME@COMMIT"
                raise UserError(Problem("data.path", found, suggestion), on_all_ranks=True)


def gather_cursor(engine: Engine, cursor: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """The cursor of the whole run from those of all replicas (None on ranks that read no data). Collective.

    What a rank does not know is -1 in its cursor, so the largest value is the known one.
    """
    local = np.full(shape, -1, dtype=np.int64) if cursor is None else cursor
    tensor = torch.from_numpy(local).to(engine.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.cpu().numpy()
