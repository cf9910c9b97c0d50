"""A run that begins with a checkpoint of another run (`run.from`): its parent, which is only read.

The branch counts its own steps, from 0 on. What it takes over becomes its checkpoint of step 0, as imported first
weights do. So every later start is a normal resume, and the parent may change or disappear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megastruct.checkpoint.agreement import together
from megastruct.checkpoint.store import complete_checkpoints, load_state, step_of
from megastruct.config.compare import changes_of_a_branch
from megastruct.config.load import load_config
from megastruct.config.schema import Config
from megastruct.data import TrainingData
from megastruct.engine.engine import Engine
from megastruct.errors import Problem, Problems, UserError
from megastruct.optimizers import OPTIMIZERS
from megastruct.planning.steps import guided_steps
from megastruct.run.checkpoints import Checkpoints, Loaded, optimizer_steps, place_in_data, restore
from megastruct.run.find import find_checkpoint, parse_address
from megastruct.run.origin import origin, write_origin
from megastruct.run.run_folder import CHECKPOINTS, CONFIG_FILE, RunFolder, read_description

WHERE = "run.from"


def begins_as_branch(folder: RunFolder) -> bool:
    """Whether the next start of the run takes over its parent's checkpoint."""
    return folder.config.run.from_ is not None and not complete_checkpoints(folder.checkpoints)


def check_parent(config: Config, data: TrainingData) -> None:
    """Check the parent of a branch that has not begun, in one process.

    Raises UserError with everything that does not fit: a missing run or checkpoint, and keys and data in which the
    branch differs and may not.
    """
    assert config.run.from_
    run, checkpoint = parse_address(config.run.from_, WHERE)
    own = RunFolder(config).path.absolute()
    if run.resolve() == own.resolve():
        raise UserError(Problem("run.name", f"{run} is the parent itself", f"run.name={run.name}-2"))
    parent = load_config(run / CONFIG_FILE)
    checkpoint = checkpoint or complete_checkpoints(run / CHECKPOINTS)[-1][1]
    problems = Problems(
        Problem(key, f"{new!r}, but {run} has {old!r}", _same(config, key, old))
        for key, old, new in changes_of_a_branch(parent, config)
    )
    problems += _state_problems(config, parent, checkpoint)
    problems += _data_problems(config, run, data.describe())
    if problems:
        raise UserError(problems, headline=f"{own} cannot branch from {run}")


def _same(config: Config, key: str, value: Any) -> str:
    inherited = f"{key}={'null' if value is None else value}"
    return f"{inherited}, or {_without_place(config)}" if not key.startswith(("model.", "ffn.")) else inherited


def _without_place(config: Config) -> str:
    return f"run.inherit={'optimizer' if config.run.inherits_optimizer else 'weights'}"


def _state_problems(config: Config, parent: Config, checkpoint: Path) -> Iterator[Problem]:
    kind, others = config.optimizer.kind, _optimizer_of(load_state(checkpoint), parent)
    kept = OPTIMIZERS[others].state if others in OPTIMIZERS else None
    if config.run.inherits_optimizer and OPTIMIZERS[kind].state != kept:
        found = f"{kind}, but the optimizer's state in {checkpoint} is that of {others}"
        anew = f"run.inherit={'data' if config.run.inherits_place else 'weights'}"
        yield Problem("optimizer.kind", found, f"optimizer.kind={others}, or {anew} (its state starts anew)")
    if step_of(checkpoint) < guided_steps(parent) and not guided_steps(config):
        found = f"{checkpoint} lies inside the guided phase, where guides produce part of the output"
        after = f"a step from {guided_steps(parent)} on"
        yield Problem(WHERE, found, f"{after}, or guided.schedule={parent.guided.schedule}")


def _optimizer_of(state: Mapping[str, Any], parent: Config) -> str:
    """The optimizer with which a checkpoint with these plain values was written."""
    return str(state.get("optimizer", parent.optimizer.kind))


def _data_problems(config: Config, run: Path, data: dict[str, Any]) -> Iterator[Problem]:
    described = read_description(run)  # empty if the parent has not trained
    compared = described if config.run.inherits_place else ("tokenizer_fingerprint",)
    for key in compared:
        if key in described and data.get(key) != described[key]:
            found = f"{data.get(key)!r}, but {run} was trained with {described[key]!r}"
            suggestion = "the parent's tokenizer" if key == "tokenizer_fingerprint" else _without_place(config)
            yield Problem(f"data ({key})", found, suggestion)


def branch(engine: Engine, checkpoints: Checkpoints) -> Loaded:
    """Load the parent's checkpoint into the engine and save it as this run's step 0. Collective over the world.

    The record of the parent is written to the run folder. Raises UserError on all ranks if there is nothing intact.
    """
    config = engine.config
    assert config.run.from_
    run, chosen = together(lambda: parse_address(config.run.from_ or "", WHERE))
    _, checkpoint = find_checkpoint(chosen or run)
    parent = together(lambda: load_config(run / CONFIG_FILE))
    state = together(lambda: load_state(checkpoint))
    with_optimizer = config.run.inherits_optimizer
    taken_steps = optimizer_steps(state) if with_optimizer else 0
    restore(engine, checkpoint, 0, taken_steps, with_optimizer, begins_guides=engine.guidance is not None)
    sample, cursor = place_in_data(parent, state) if config.run.inherits_place else (0, None)
    begun = {"sample": sample, "earlier_optimizer_steps": taken_steps}
    if dist.get_rank() == 0:
        record = {
            "kind": "run",
            "folder": str(run),
            "step": int(state["step"]),
            "inherit": config.run.inherit,
            "optimizer": _optimizer_of(state, parent),
            "tokens": state.get("tokens"),
            "origin": origin(run),
        }
        write_origin(checkpoints.folder.path, record)
    checkpoints.start_save(engine, 0, np.empty(0, np.int64) if cursor is None else cursor, begun)
    return Loaded(0, cursor, {"step": 0, **begun})
