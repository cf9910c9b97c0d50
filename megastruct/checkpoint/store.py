"""Checkpoints: torch.distributed.checkpoint for tensors, JSON for the rest, complete or absent.

    checkpoints/step_00000100/    .metadata, __R_0.distcp   tensors by global name, from any layout, a file per rank
                                  state.json                step, data cursor, versions
                                  checksums.json            size and SHA-256 of each of these files

A checkpoint is written into a hidden folder beside its place and renamed when every rank has finished, so a folder
that has its final name is complete.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megastruct.checkpoint.agreement import gather, rank_in, size_of, together
from megastruct.checkpoint.checksums import MANIFEST_FILE, Checksum, ChecksumWriter, checksum_of, manifest_text
from megastruct.checkpoint.reading import SafeFileSystemReader, TensorLoadPlanner
from megastruct.checkpoint.sharded import global_shape
from megastruct.errors import Problem, UserError
from megastruct.files import sync_folder, write_atomically

STATE_FILE = "state.json"
_NAME = re.compile(r"^step_(\d{8,})$")


def checkpoint_folder(root: Path, step: int) -> Path:
    """The folder of the checkpoint of `step` below `root`."""
    return root / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step_"))


def step_in(name: str) -> int | None:
    """The step, if `name` is that of a complete checkpoint's folder."""
    match = _NAME.match(name)
    return int(match[1]) if match else None


def is_checkpoint(folder: Path) -> bool:
    """Whether it is the folder of a complete checkpoint, by its name."""
    return folder.is_dir() and _NAME.match(folder.name) is not None


def complete_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all complete checkpoints below `root`, oldest first."""
    if not root.is_dir():
        return []
    return sorted((step_of(path), path) for path in root.iterdir() if is_checkpoint(path))


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint below `root`, None without one."""
    found = complete_checkpoints(root)
    return found[-1][1] if found else None


@dataclass(frozen=True)
class Keeping:
    """Which checkpoints stay: the `newest` ones, and, if it is not 0, those of every `every`th step."""

    newest: int
    every: int = 0

    def outdated(self, steps: Iterable[int]) -> list[int]:
        """The steps whose complete checkpoints are removed after a save. Step 0 is not this run's work."""
        old = sorted(steps)[: -self.newest]
        return [step for step in old if not (self.every and step and step % self.every == 0)]


def save_checkpoint(
    root: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep: Keeping | int,
    group: Any = None,
    wanted: Sequence[str] = (),
) -> Path:
    """Write a checkpoint from all ranks, then remove those that `keep` does not keep (a number: the newest ones).
    Collective over `group`, the world, or in one process without a group.

    `tensors`: this rank's CPU tensors by global name, a `ShardedTensor` where it holds a part; what several ranks hold
    is written once.
    `state`: plain values for state.json, taken from rank 0.
    `wanted`: names that must be held by some rank: what nobody holds would be missed at the next resume only.
    Raises RuntimeError on all ranks if nobody does, before anything is written, and UserError on all ranks if a file
    cannot be written; what was complete before still is.
    """
    final = checkpoint_folder(root, step)
    aside = root / f".{final.name}.writing"
    kept = Keeping(keep) if isinstance(keep, int) else keep
    writer = ChecksumWriter(aside)
    _refuse_missing(tensors, wanted, group)
    try:
        _on_first_rank(lambda: _make_room(root, aside), final, group)
        with (
            nullcontext() if dist.is_initialized() else _in_one_process(),
            _disk_errors(final, on_all_ranks=True),
        ):  # DCP hands the failure of one rank to all
            dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=not dist.is_initialized())
        checksums = _gather_on_first_rank(writer.checksums, group)
        _on_first_rank(lambda: _publish(aside, final, state, checksums, kept), final, group)
    except UserError:
        if rank_in(group) == 0:
            shutil.rmtree(aside, ignore_errors=True)  # it may be what fills the disk
        raise
    return final


def _refuse_missing(tensors: dict[str, Tensor], wanted: Sequence[str], group: Any) -> None:
    ranks = gather((list(tensors), list(wanted)), group)
    held = {name for own, _ in ranks for name in own}
    missing = sorted({name for _, names in ranks for name in names} - held)
    if missing:
        raise RuntimeError(f"no rank holds {len(missing)} tensors of the checkpoint, among them {missing[0]}")


def load_state(folder: Path) -> dict[str, Any]:
    """The plain values of a checkpoint. Raises UserError if they cannot be read."""
    path = folder / STATE_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(Problem(str(path), f"cannot be read: {error}", f"remove {folder}")) from None


def load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` (by global name) in place with what this rank holds; not collective. Others may be stored, too.

    Beside them it needs the memory of one stored piece (`MAX_PIECE_ELEMENTS`) and of the checkpoint's metadata.
    Raises UserError if a tensor is missing or has another shape, or a file is damaged.
    """
    stored, problems = _stored(folder), []
    for name, tensor in tensors.items():
        record, wanted = stored.get(name), global_shape(tensor)
        if not isinstance(record, TensorStorageMetadata):
            problems.append(Problem(f"{folder}: {name}", f"missing, but the model needs shape {list(wanted)}"))
        elif record.size != wanted:
            problems.append(
                Problem(f"{folder}: {name}", f"has shape {list(record.size)}, but the model needs {list(wanted)}")
            )
    if problems:
        raise UserError(problems[:8], headline=f"{folder} does not fit the model ({len(problems)} tensors)")
    with _in_one_process():
        try:
            dcp.load(tensors, storage_reader=SafeFileSystemReader(folder), planner=TensorLoadPlanner(), no_dist=True)
        except (CheckpointException, OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            found = f"a damaged checkpoint: {reason[-1]}"
            raise UserError(Problem(str(folder), found, "remove it to resume from the one before")) from None


def stored_names(folder: Path) -> set[str]:
    """The names of all tensors of a checkpoint. Raises UserError if they cannot be read."""
    return set(_stored(folder))


def _stored(folder: Path) -> dict[str, Any]:
    try:
        return SafeFileSystemReader(folder).read_metadata().state_dict_metadata
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(Problem(str(folder), f"cannot be read: {error}", f"remove {folder}")) from None


def _make_room(root: Path, aside: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for left_over in (*root.glob(".step_*.writing"), *root.glob(".step_*.removing")):  # of a killed run
        shutil.rmtree(left_over)
    aside.mkdir()


def _publish(aside: Path, final: Path, state: dict[str, Any], checksums: dict[str, Checksum], keep: Keeping) -> None:
    write_atomically(aside / STATE_FILE, json.dumps(state, indent=1))
    checksums = checksums | {STATE_FILE: checksum_of(aside / STATE_FILE)}
    write_atomically(aside / MANIFEST_FILE, manifest_text(checksums))
    hidden = _hide(final) if final.exists() else None  # an equal step of an earlier attempt
    try:
        os.replace(aside, final)
    except OSError:
        if hidden:  # it is complete, and may be the only one
            os.replace(hidden, final)
        raise
    sync_folder(final.parent)
    if hidden:
        shutil.rmtree(hidden)
    complete = dict(complete_checkpoints(final.parent))
    for step in keep.outdated(complete):
        shutil.rmtree(_hide(complete[step]))


def _hide(folder: Path) -> Path:
    """Out of sight before it is removed: what has its final name is complete, also when the removal is interrupted."""
    hidden = folder.with_name(f".{folder.name}.removing")
    os.replace(folder, hidden)
    return hidden


def _on_first_rank(function: Callable[[], None], final: Path, group: Any) -> None:
    """Call `function` on rank 0; what the disk refuses it is raised on all ranks."""

    def call() -> None:
        if rank_in(group) == 0:
            with _disk_errors(final):
                function()

    together(call, group)


@contextmanager
def _in_one_process() -> Iterator[None]:
    """Without DCP's warning that it works in one process, which is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _disk_errors(final: Path, on_all_ranks: bool = False) -> Iterator[None]:
    """Turn what the file system refuses (full, read-only, over a quota) into a UserError."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        failures = [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
        refused = [failure for failure in (error, *failures) if isinstance(failure, OSError)]
        if not refused:
            raise
        found = f"could not be written: {refused[0].strerror or refused[0]}"
        before = latest_checkpoint(final.parent)
        saved = f"{before.name} is complete" if before else "no checkpoint is complete yet"
        suggestion = f"free some space, then run the same command again to resume ({saved})"
        raise UserError(Problem(str(final), found, suggestion), on_all_ranks=on_all_ranks) from None


def _gather_on_first_rank(own: dict[str, Checksum], group: Any) -> dict[str, Checksum]:
    """The checksums of all ranks on rank 0, an empty dict on the others."""
    if not dist.is_initialized():
        return own
    gathered: list[Any] | None = [None] * size_of(group) if rank_in(group) == 0 else None
    dist.gather_object(own, gathered, group=group)
    return {name: checksum for one in gathered or [] for name, checksum in one.items()}
