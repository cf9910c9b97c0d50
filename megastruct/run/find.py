"""Finds a run and its checkpoint by the path of either."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megastruct.checkpoint.intact import newest_intact, require_intact
from megastruct.checkpoint.store import checkpoint_folder, complete_checkpoints, is_checkpoint, step_of
from megastruct.errors import Problem, UserError
from megastruct.run.run_folder import CHECKPOINTS, CONFIG_FILE


def run_of(path: str | os.PathLike[str]) -> Path:
    """The run folder of a run folder or of a checkpoint folder in one; any other path as it is, absolute.

    Raises UserError if it is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(Problem("path", f"{path!r} is no path", "the folder of a run, for example runs/quickstart"))
    path = Path(path).absolute()
    run = path.parent.parent
    return run if is_checkpoint(path) and (run / CONFIG_FILE).exists() else path


def find_checkpoint(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """(run folder, intact checkpoint folder) of a run folder or of a checkpoint folder in one. Nothing is changed.

    Collective over the world, or in one process without a group. Raises UserError if it is neither, or nothing in it is
    intact.
    """
    run, path = run_of(path), Path(path).absolute()
    if path != run:
        require_intact(path)
        return run, path
    require_run(path, "")
    root = path / CHECKPOINTS
    folder, _ = newest_intact(root)
    if folder is None:
        raise UserError(Problem(str(root), "has no complete checkpoint", "train until the first one is saved"))
    return path, folder


def require_run(path: Path, where: str) -> None:
    """Raise UserError, which names `where` or the path itself, if there is no run folder at `path`."""
    if not (path / CONFIG_FILE).exists():
        found = "is not a run folder (it has no config.yaml)" if path.exists() else "does not exist"
        found = f"{path} {found}" if where else found
        raise UserError(Problem(where or str(path), found, "the folder of a run, for example runs/quickstart"))


def parse_address(address: str, where: str) -> tuple[Path, Path | None]:
    """(run folder, checkpoint folder) of FOLDER@STEP or of a checkpoint folder; without a step (run folder, None).

    Reads only names. Raises UserError, which names `where`, if there is no such run or checkpoint.
    """
    if "://" in address:
        found = f"{address} is an address, but a run is read from a folder of this machine"
        raise UserError(Problem(where, found, f"copy it to a folder, then {where}=FOLDER@STEP"))
    path, step = Path(address).expanduser().absolute(), None
    if not path.exists() and (match := re.fullmatch(r"(.+)@(\d+)", address)):
        path, step = Path(match[1]).expanduser().absolute(), int(match[2])
    run = run_of(path)
    if run != path:
        step = step_of(path)
    require_run(run, where)
    steps = [known for known, _ in complete_checkpoints(run / CHECKPOINTS)]
    if not steps:
        raise UserError(Problem(where, f"{run} has no complete checkpoint", "train it until the first one is saved"))
    if step is None:
        return run, None
    if step not in steps:
        suggestion = f"{where}={run}@{min(steps, key=lambda known: abs(known - step))}"
        known = ", ".join(map(str, steps))
        raise UserError(Problem(where, f"{run} has no checkpoint of step {step}, only of {known}", suggestion))
    return run, checkpoint_folder(run / CHECKPOINTS, step)
