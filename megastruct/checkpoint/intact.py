"""Which checkpoint to load: the newest whose files are as they were written."""

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
    """The newest checkpoint of which no file is missing or cut off. Quick: nothing but the manifest is read."""
    for _, folder in reversed(complete_checkpoints(root)):
        manifest, problem = _manifest(folder)
        if not problem and not any(size_problem(folder / name, wanted) for name, wanted in manifest.items()):
            return folder
    return None


def newest_intact(root: Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint with the right checksums, the same on all ranks, and the damaged ones that are newer.

    Collective over the world, or alone without a process group; each file is read by one rank. (None, []) without a
    checkpoint. What it passes over rank 0 says on stderr. Raises UserError on all ranks if there are checkpoints and
    none is intact.
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
        last = Problem("", "no checkpoint is intact", "restore the files, or another run.name to begin anew")
        raise UserError([*damages.values(), last], headline=f"nothing to load in {root}", on_all_ranks=True)
    return None, []


def set_aside(folders: list[Path]) -> None:
    """Rename damaged checkpoints to NAME.damaged, where none counts them among those to keep. Rank 0 does it."""
    for folder in folders if rank_in() == 0 else []:
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)


def _damage(folder: Path) -> str:
    """The first thing that is wrong with a checkpoint; empty if nothing is. The same on all ranks."""
    manifest, problem = _manifest(folder)
    for index, (name, wanted) in enumerate(sorted(manifest.items())):
        if index % size_of() == rank_in() and not problem:
            problem = content_problem(folder / name, wanted)
    return next(filter(None, gather(problem)), "")


def _manifest(folder: Path) -> tuple[dict[str, Checksum], str]:
    """(checksums by file, what is wrong with them or with the list of files)."""
    try:
        manifest = read_manifest(folder)
        found = {path.name for path in folder.iterdir()}  # rank 0 may set the folder aside between the two
    except (OSError, ValueError) as error:
        return {}, f"no readable checksums: {error}"
    unlisted = found - set(manifest) - {MANIFEST_FILE}
    return manifest, f"{min(unlisted)} has no checksum" if unlisted else ""
