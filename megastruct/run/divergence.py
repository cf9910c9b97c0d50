"""Detects steps that must not count: a loss or gradient that is not finite, and a sudden spike of the loss."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

from megastruct.config.schema import Config
from megastruct.errors import Problem, Problems, UserError
from megastruct.run.run_folder import RunFolder


class Divergence:
    """The skipped steps and spikes of a run so far; the same on all ranks, and stored in its checkpoints."""

    def __init__(self, config: Config, state: dict[str, Any]) -> None:
        """`state`: the plain values of a checkpoint, or empty."""
        self.config = config
        self.skipped_steps: int = state.get("skipped_steps", 0)
        self.spikes: int = state.get("spikes", 0)
        self.skipped_data_steps: int = state.get(
            "skipped_data_steps", 0
        )  # by how many steps the data is ahead of the run
        if state.get("step") == config.training.base_steps:  # from here on the data is read again, from its start
            self.skipped_data_steps = 0
        self.recent_losses: deque[float] = deque(
            state.get("recent_losses", []), maxlen=config.reliability.spike_window_steps
        )

    def state_at(self, step: int) -> dict[str, Any]:
        """The plain values that a checkpoint of `step` stores."""
        state: dict[str, Any] = {"tokens": self.config.training.tokens(step)}
        state |= {"skipped_steps": self.skipped_steps}
        if self.config.reliability.spike_factor:
            state |= {"spikes": self.spikes, "recent_losses": list(self.recent_losses)}
        return state | {"skipped_data_steps": self.skipped_data_steps}

    def note(
        self, step: int, loss: float, gradient_norm: float, finish_save: Callable[[], None] = lambda: None
    ) -> bool:
        """Note the loss of step `step`, and count the step if the optimizer skipped it for a norm that is not finite.

        Returns whether the loss is a spike. Raises UserError on all ranks if there are too many skipped steps or too
        many spikes, or if the loss is not finite although the gradient is; so broken weights never replace a good
        checkpoint. Before that, `finish_save` waits for a save that is on its way, collectively.
        """
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            return self._is_spike(step, loss, finish_save)
        limit = self.config.reliability.max_skipped_steps
        self.skipped_steps += 1
        if self.skipped_steps <= limit and not math.isfinite(gradient_norm):
            return False
        found = f"the loss is {loss} and the gradient norm {gradient_norm} at step {step}"
        if limit:
            found += f", skipped step {self.skipped_steps} of the run (reliability.max_skipped_steps = {limit})"
        raise self._end(found, finish_save)

    def went_back(self, from_step: int, to_step: int, state: dict[str, Any]) -> Divergence:
        """The counts after a return from a spike at `from_step` to the checkpoint of `to_step`, with later data."""
        back = Divergence(self.config, state)
        back.spikes = self.spikes + 1
        back.skipped_data_steps = self.skipped_data_steps + from_step - to_step
        return back

    def _is_spike(self, step: int, loss: float, finish_save: Callable[[], None]) -> bool:
        """Normal losses enter the median window. Until it is full, nothing counts as a spike."""
        limits = self.config.reliability
        full = len(self.recent_losses) == self.recent_losses.maxlen
        if limits.spike_factor and full and loss > limits.spike_factor * median(self.recent_losses):
            if self.spikes < limits.max_spikes:
                return True
            found = f"loss spike at step {step}: {loss:.4g} is above {limits.spike_factor:g} x the recent median"
            times = "once" if self.spikes == 1 else f"{self.spikes} times"
            limit = f"reliability.max_spikes = {limits.max_spikes}"
            raise self._end(f"{found}, and the run has already gone back {times} ({limit})", finish_save)
        self.recent_losses.append(loss)
        return False

    def _end(self, found: str, finish_save: Callable[[], None]) -> UserError:
        problems = Problems()
        problems.collect(finish_save)  # a save that failed is told as well
        folder = RunFolder(self.config)
        saved = f"step {folder.finished_steps()} is saved in {folder.path}"
        suggestion = f"a new run with a lower optimizer.learning_rate or a longer warm-up ({saved})"
        return UserError([Problem("training", found, suggestion), *problems], on_all_ranks=True)
