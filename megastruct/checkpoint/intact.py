"""Chooses the checkpoint to load: the newest one whose files are undamaged."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from megastruct.checkpoint.agreement import from_first_rank, gather, rank_in, size_of
from megastruct.checkpoint.checksums import MANIFEST_FILE, Checksum, content_problem, read_manifest, size_problem
from megastruct.checkpoint.store import complete_checkpoints
from megastruct.errors import Problem, UserError


def newest_of_right_size(root: Path) -> Path | None:
    """The newest checkpoint of which no file is missing or truncated; None without one. Reads only the manifests."""
    for _, folder in reversed(complete_checkpoints(root)):
        manifest, problem = _manifest(folder)
        if not problem and not any(size_problem(folder / name, wanted) for name, wanted in manifest.items()):
            return folder
    return None


def newest_intact(root: Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint with the right checksums, and the damaged ones that are newer; the same on all ranks.

    Collective over the world, or in one process without a group; each file is read by one rank. Returns (None, []) if
    there is no checkpoint. Rank 0 reports skipped checkpoints on stderr. Raises UserError on all ranks if there are
    checkpoints and all of them are damaged.
    """
    damages: dict[Path, Problem] = {}
    for folder in from_first_rank([folder for _, folder in reversed(complete_checkpoints(root))]):
        damage = _damage(folder)
        if not damage:
            for problem in damages.values() if rank_in() == 0 else []:
                print(f"warning: {problem}; going back to {folder.name}", file=sys.stderr, flush=True)
            return folder, list(damages)
        damages[folder] = Problem(str(folder), f"damaged: {damage}")
    if damages:
        last = Problem("", "every checkpoint is damaged", "restore the files, or start a new run with another run.name")
        raise UserError([*damages.values(), last], headline=f"nothing to load in {root}", on_all_ranks=True)
    return None, []


def require_intact(folder: Path) -> None:
    """Raise UserError on all ranks if a file of the checkpoint is damaged. Collective as `newest_intact` is."""
    if damage := _damage(folder):
        others = [str(other) for _, other in complete_checkpoints(folder.parent) if other != folder]
        suggestion = others[-1] if others else "restore the file"
        raise UserError(Problem(str(folder), f"damaged: {damage}", suggestion), on_all_ranks=True)


def set_aside(folders: list[Path]) -> None:
    """Rename damaged checkpoints to NAME.damaged on rank 0, so that they do not count among those to keep."""
    for folder in folders if rank_in() == 0 else []:
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)


def _damage(folder: Path) -> str:
    """The first damage found in a checkpoint, the same on all ranks; empty if there is none."""
    manifest, problem = _manifest(folder)
    for index, (name, wanted) in enumerate(sorted(manifest.items())):
        if index % size_of() == rank_in() and not problem:
            problem = content_problem(folder / name, wanted)
    return next(filter(None, gather(problem)), "")


def _manifest(folder: Path) -> tuple[dict[str, Checksum], str]:
    """(checksums by file name, a description of what is wrong with them or with the list of files)."""
    try:
        manifest = read_manifest(folder)
        found = {path.name for path in folder.iterdir()}  # rank 0 may set the folder aside between the two
    except (OSError, ValueError) as error:
        return {}, f"no readable checksums: {error}"
    unlisted = found - set(manifest) - {MANIFEST_FILE}
    return manifest, f"{min(unlisted)} has no checksum" if unlisted else ""
