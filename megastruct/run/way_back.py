"""The return from a loss spike to the newest checkpoint, from which the run continues with the data after the spike."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from megastruct.checkpoint.store import step_of
from megastruct.config.schema import Config
from megastruct.engine.engine import Engine
from megastruct.planning.steps import guided_steps
from megastruct.run.checkpoints import Checkpoints, load_checkpoint
from megastruct.run.divergence import Divergence


class Returned(NamedTuple):
    """Where a run continues after it went back: its finished steps, and its skipped steps and spikes so far."""

    step: int
    divergence: Divergence


def is_way_back(config: Config, spike: int, to: int, guides_left: bool) -> bool:
    """Whether a run can go back from a spike at step `spike` to the checkpoint of step `to` (0: there is none).

    It cannot cross the start of the second reading of the data, where the reader begins anew and would not skip the
    data. And it cannot go back into the guided phase once the guides are dropped.
    """
    over_the_start = to <= config.training.base_steps < spike
    return to > 0 and not over_the_start and not (guides_left and to < guided_steps(config))


def go_back(
    engine: Engine,
    checkpoints: Checkpoints,
    divergence: Divergence,
    spike: int,
    loss: float,
    cursor: np.ndarray,
    kept: dict[str, Any],
) -> Returned | None:
    """After a spike at step `spike`, load the newest checkpoint and save it again with the data position `cursor`.

    The checkpoint also takes over the plain values `kept`: the next sample, and what the steps up to the spike cost.
    Returns None if the run cannot go back; the loss then counts as a normal one. Collective.
    """
    config, guides_left = engine.config, not engine.guidance
    checkpoints.finish_save()  # it may be the newest
    checkpoint = None  # searched only if going back is possible, because all its files are read to check them
    if is_way_back(config, spike, checkpoints.agreed_finished_steps(), guides_left):
        checkpoint = checkpoints.newest()
    if checkpoint is None or not is_way_back(config, spike, step_of(checkpoint), guides_left):
        divergence.recent_losses.append(loss)  # otherwise every loss after a lasting rise would be a spike
        return None
    loaded = load_checkpoint(engine, checkpoint)
    divergence = divergence.went_back(spike, loaded.step, loaded.state)
    # A restart must not read the skipped data, either.
    checkpoints.save(engine, loaded.step, cursor, divergence.state_at(loaded.step) | kept)
    return Returned(loaded.step, divergence)
