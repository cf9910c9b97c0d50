"""A run's state between an engine and its checkpoints: parameters, optimizer state, step, position in the data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megastruct.checkpoint.agreement import from_first_rank, gather, rank_in, together
from megastruct.checkpoint.background import BackgroundSaver
from megastruct.checkpoint.intact import newest_intact, set_aside
from megastruct.checkpoint.sharded import ShardedTensor
from megastruct.checkpoint.store import (
    Keeping,
    checkpoint_folder,
    load_state,
    load_tensors,
    save_checkpoint,
    stored_names,
)
from megastruct.config.schema import Config
from megastruct.engine.engine import Engine
from megastruct.engine.state import Fragment, begin_restore, finish_restore, saved_fragments
from megastruct.engine.zero import whole_shape
from megastruct.errors import Problem, UserError
from megastruct.models.guidance import LINEARS, is_guide
from megastruct.models.mlp import MLP
from megastruct.optimizers import ADAMW, MASTER, OPTIMIZERS
from megastruct.parallel.shards import Box
from megastruct.planning.steps import data_sample, guided_steps, total_steps
from megastruct.run.mirroring import Mirroring
from megastruct.run.run_folder import RunFolder


class Loaded(NamedTuple):
    """What a checkpoint holds besides tensors: finished steps, the run's position in the data, plain values."""

    step: int
    cursor: np.ndarray | None
    state: dict[str, Any]


class Checkpoints:
    """Writes the checkpoints of a run while training continues, and finds them again.

    Each rank of a run has one object, because a save outlives the engine that it came from.
    """

    def __init__(self, folder: RunFolder) -> None:
        kept = folder.config.checkpoint
        self.root, self.keep = folder.checkpoints, Keeping(kept.keep, kept.keep_every)
        self.folder = folder
        self._saver = BackgroundSaver()
        self._mirroring = Mirroring.of(folder.config) if rank_in() == 0 else None

    def start_save(self, engine: Engine, step: int, cursor: np.ndarray, state: dict[str, Any]) -> None:
        """Copy `step`'s state to host memory and write it while training continues. Collective over the world.

        `cursor`: the whole run's (`gather_cursor`). From the end of the guided phase on the guides are left out.
        Waits for the save before. Raises UserError on all ranks if that one could not be written.
        """
        guided = step < guided_steps(engine.config)
        names = [name for name, _ in engine.named_parameters() if guided or not is_guide(name)]
        owned = {own.name: own for own in saved_fragments(engine) if own.name in names}
        views = {f"{kind}.{name}": tensor for name, own in owned.items() for kind, tensor in own.tensors.items()}
        copies = self._saver.host_copies(views)
        tensors: dict[str, Tensor] = {
            f"{kind}.{name}": _global(engine, fragment, copies[f"{kind}.{name}"])
            for name, fragment in owned.items()
            for kind in fragment.tensors
        }
        layout = engine.config.parallel.model_dump()
        optimizer = {"optimizer": engine.config.optimizer.kind}
        state = {"step": step, "cursor": cursor.tolist(), "layout": layout, **optimizer, **state}
        kinds = engine.saved_kinds()
        wanted = [f"{kind}.{name}" for name in names for kind in kinds[name]]

        def write(group: dist.ProcessGroup) -> None:
            self._mirror(save_checkpoint(self.root, step, tensors, state, self.keep, group, wanted))

        self._saver.start(write)

    def finish_save(self) -> None:
        """Wait for the save that is on its way. Raises UserError on all ranks if it could not be written."""
        self._saver.wait()

    def finish(self) -> None:
        """Like `finish_save`, then wait for the mirror's copy, for a limited time. Collective."""
        self.finish_save()
        if self.folder.config.checkpoint.mirror:
            if self._mirroring:
                self._mirroring.finish(self.folder.config.checkpoint.mirror_wait_seconds)
            self._saver.meet()

    def save(self, engine: Engine, step: int, cursor: np.ndarray, state: dict[str, Any]) -> Path:
        """`start_save` and `finish_save`: the checkpoint is complete when it returns."""
        self.start_save(engine, step, cursor, state)
        self.finish_save()
        return checkpoint_folder(self.root, step)

    def newest(self) -> Path | None:
        """The newest intact checkpoint, if there is one; damaged ones that are newer are set aside. Collective.

        Raises UserError on all ranks if there are checkpoints and none is intact.
        """
        self.finish_save()
        self._saver.connect()
        folder, damaged = newest_intact(self.root)
        set_aside(damaged)
        if folder:
            self._mirror(folder)  # its copy may have been interrupted
        return folder

    def agreed_finished_steps(self) -> int:
        """Steps of the newest checkpoint, after all ranks have found it. Collective.

        Raises UserError on all ranks if they have not: they would wait for each other until the group's time is out.
        """
        steps = from_first_rank(self.folder.finished_steps())
        sees = not steps or checkpoint_folder(self.root, steps).is_dir()
        blind = [rank for rank, seen in enumerate(gather(sees)) if not seen]
        if blind:
            message = f"rank {blind[0]} does not see the checkpoint of step {steps}, which rank 0 sees"
            suggestion = "a folder on a file system that all nodes share"
            raise UserError(Problem("run.folder", message, suggestion), on_all_ranks=True)
        return steps

    def _mirror(self, folder: Path) -> None:
        if self._mirroring:
            self._mirroring.offer(folder)


def load_checkpoint(engine: Engine, folder: Path | None) -> Loaded:
    """Load a checkpoint into the engine; step 0 and no cursor without a folder. Collective.

    What the engine has no parameter for may be stored, too. Raises UserError on all ranks if it does not fit the model.
    """
    if folder is None:
        return Loaded(0, None, {})
    state = together(lambda: load_state(folder))
    together(lambda: _check_optimizer(engine.config.optimizer.kind, state.get("optimizer", ADAMW), folder))
    restore(engine, folder, state["step"], optimizer_steps(state))
    cursor = np.array(state["cursor"], dtype=np.int64)
    return Loaded(state["step"], cursor if cursor.size else None, state)


def restore(
    engine: Engine,
    folder: Path,
    step: int,
    optimizer_steps: int,
    with_optimizer: bool = True,
    begins_guides: bool = False,
) -> None:
    """Make the engine one of `step` finished steps with the weights of a checkpoint. Collective.

    `with_optimizer`: with the optimizer's state, after `optimizer_steps` steps of it. `begins_guides`: if only the
    engine has guides, they begin as the dense equivalents of what they guide.
    """
    fragments = begin_restore(engine, step, optimizer_steps)
    stored = together(lambda: stored_names(folder)) if begins_guides else set()
    guides = {name for name in fragments if is_guide(name)} if begins_guides else set()
    without = {name for name in guides if f"{MASTER}.{name}" not in stored}
    tensors: dict[str, Tensor] = {
        f"{kind}.{name}": _global(engine, fragment, tensor)
        for name, fragment in fragments.items()
        for kind, tensor in fragment.tensors.items()
        if name not in without and (with_optimizer or kind == MASTER)
    }
    together(lambda: load_tensors(folder, tensors))
    finish_restore(engine)
    if begins_guides and any(gather(bool(without))):
        _begin_guides(engine, fragments)
        finish_restore(engine)


@torch.no_grad()
def _begin_guides(engine: Engine, fragments: dict[str, Fragment]) -> None:
    """Make every guide the dense equivalent of its linear, as in a new model. Collective."""
    for path, module in engine.module.named_modules():
        if not isinstance(module, MLP) or module.fc1_guide is None:
            continue
        for linear in LINEARS:
            with engine.gathered((structured := getattr(module, linear)).factors()):
                dense = structured.to_dense()
            if fragment := fragments.get(f"{engine.canonical_name(path)}.{linear}_guide.weight"):
                for offsets, piece in _global(engine, fragment, fragment.tensors[MASTER]).pieces.items():
                    place = tuple(slice(start, start + size) for start, size in zip(offsets, piece.shape, strict=True))
                    piece.copy_(dense[place])


def optimizer_steps(state: Mapping[str, Any]) -> int:
    """The steps that the optimizer has made up to a checkpoint, those of the run's parents included."""
    return state.get("earlier_optimizer_steps", 0) + state["step"] - state.get("skipped_steps", 0)


def place_in_data(config: Config, state: Mapping[str, Any]) -> tuple[int, np.ndarray | None]:
    """(next global sample, cursor) with which the run of `config` goes on after a checkpoint with these plain values.

    Without a cursor, reading begins anew: before the first step, and where the second reading begins.
    """
    step = state.get("step", 0)
    if step == config.training.base_steps < total_steps(config):
        return 0, None
    cursor = np.array(state.get("cursor", ()), dtype=np.int64)
    sample = state.get("sample")
    if sample is None:  # from before it was stored, when all batches had one size
        sample = data_sample(config, step) + state.get("skipped_data_steps", 0) * config.training.global_batch_size
    return sample, cursor if cursor.size and sample else None


def _check_optimizer(wanted: str, found: str, folder: Path) -> None:
    """Raises UserError if the checkpoint was written with an optimizer that keeps other kinds of state."""
    kinds = [", ".join(OPTIMIZERS[kind].state) if kind in OPTIMIZERS else "unknown" for kind in (wanted, found)]
    if kinds[0] != kinds[1]:
        message = f"{wanted}, which keeps {kinds[0]}; {folder} was written with {found}, which keeps {kinds[1]}"
        raise UserError(Problem("optimizer.kind", message, f"optimizer.kind={found}, or a new run.name"))


def _global(engine: Engine, fragment: Fragment, tensor: Tensor) -> ShardedTensor:
    """`tensor`, which has the fragment's elements, under the global form of its parameter."""
    parameter: Any = fragment.parameter
    local_shape = whole_shape(parameter)
    spec = getattr(parameter, "shard_spec", None)
    if spec is None:
        origin = (0,) * len(local_shape)
        return ShardedTensor.of_fragment(
            tensor, fragment.start, local_shape, local_shape, [Box(origin, origin, tuple(local_shape))]
        )
    shape = parameter.global_shape
    return ShardedTensor.of_fragment(tensor, fragment.start, local_shape, shape, spec.boxes(shape, engine.tp.rank))
