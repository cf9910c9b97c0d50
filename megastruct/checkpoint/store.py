"""Checkpoints: torch.distributed.checkpoint for tensors, JSON for the rest, complete or absent.

    checkpoints/step_00000100/    .metadata, __R_0.distcp   tensors by global name, each whole, from any layout
                                  state.json                step, data cursor, versions

A checkpoint is written into a hidden folder beside its place and renamed when every rank has finished, so a folder
that has its final name is complete. Nothing that is read can execute code: DCP reads tensors with `weights_only`, and
its metadata, a pickle, goes through an unpickler that knows DCP's own record types and nothing else.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megastruct.checkpoint.sharded import global_shape
from megastruct.errors import Problem, UserError

STATE_FILE = "state.json"
_NAME = re.compile(r"^step_(\d{8,})$")


def checkpoint_folder(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def complete_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all complete checkpoints below `root`, oldest first."""
    if not root.is_dir():
        return []
    matches = [(match, path) for path in root.iterdir() if path.is_dir() and (match := _NAME.match(path.name))]
    return sorted((int(match[1]), path) for match, path in matches)


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint below `root`, if there is one."""
    found = complete_checkpoints(root)
    return found[-1][1] if found else None


def save_checkpoint(root: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint from all ranks, then remove all but the newest `keep`. Collective over the world.

    `tensors`: this rank's CPU tensors by global name, a `ShardedTensor` where it holds a part; what several ranks hold
    is written once.
    `state`: plain values for state.json, taken from rank 0.
    """
    final = checkpoint_folder(root, step)
    aside = root / f".{final.name}.writing"
    if dist.get_rank() == 0:
        root.mkdir(parents=True, exist_ok=True)
        for left_over in (*root.glob(".step_*.writing"), *root.glob(".step_*.removing")):  # of a killed run
            shutil.rmtree(left_over)
        aside.mkdir()
    dist.barrier()
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(aside, single_file_per_rank=True, sync_files=True))
    dist.barrier()
    if dist.get_rank() == 0:
        _write_synced(aside / STATE_FILE, json.dumps(state, indent=1))
        if final.exists():  # an equal step of an earlier attempt
            _remove(final)
        os.replace(aside, final)
        _sync_folder(root)
        for _, old in complete_checkpoints(root)[:-keep]:
            _remove(old)
    dist.barrier()
    return final


def load_state(folder: Path) -> dict[str, Any]:
    """The plain values of a checkpoint. Raises UserError if they cannot be read."""
    path = folder / STATE_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(Problem(str(path), f"no readable checkpoint: {error}", f"remove {folder}")) from None


def load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` (CPU, by global name) in place; every rank reads what it needs. Works without a process group.

    Raises UserError if a tensor is missing or has another shape, or a file is damaged.
    """
    reader = SafeFileSystemReader(folder)
    try:
        stored = reader.read_metadata().state_dict_metadata
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(Problem(str(folder), f"no readable checkpoint: {error}", f"remove {folder}")) from None
    problems = []
    for name, tensor in tensors.items():
        size, wanted = getattr(stored.get(name), "size", None), global_shape(tensor)
        if size != wanted:
            found = "missing" if size is None else f"of shape {list(size)}"
            problems.append(Problem(f"{folder}: {name}", f"{found}, the model wants {list(wanted)}"))
    if problems:
        raise UserError(problems[:8], headline=f"{folder} does not fit the model ({len(problems)} tensors)")
    with warnings.catch_warnings():  # that it loads in one process is what was asked for
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
        except (CheckpointException, OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            found = f"a damaged checkpoint: {reason[-1]}"
            raise UserError(Problem(str(folder), found, "remove it to resume from the one before")) from None


def _remove(folder: Path) -> None:
    """Out of sight first: what has its final name is complete, also when the removal is interrupted."""
    hidden = folder.with_name(f".{folder.name}.removing")
    os.replace(folder, hidden)
    shutil.rmtree(hidden)


class SafeFileSystemReader(dcp.FileSystemReader):
    """DCP's reader with an unpickler for `.metadata` that builds nothing but DCP's records."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _MetadataUnpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _NAMES = (
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),  # DCP notes where it wrote; the path is never used
        ("pathlib._local", "PosixPath"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if module in self._MODULES:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:  # its own records, not what it imports
                return found
        elif (module, name) in self._NAMES:
            return super().find_class(module, name)
        elif module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name} has no place in checkpoint metadata")


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
