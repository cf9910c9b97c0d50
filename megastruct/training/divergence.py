"""Steps that must not count: a loss or a gradient that is not finite."""

from __future__ import annotations

import math
from typing import Any

from megastruct.config.schema import Config
from megastruct.errors import Problem, UserError
from megastruct.training.run_folder import finished_steps, run_folder


class Divergence:
    """What has gone wrong in a run so far; the same on all ranks, and kept in its checkpoints."""

    def __init__(self, config: Config, state: dict[str, Any]) -> None:
        """`state`: a checkpoint's, or empty."""
        self.config = config
        self.skipped_steps: int = state.get("skipped_steps", 0)

    @property
    def state(self) -> dict[str, Any]:
        return {"skipped_steps": self.skipped_steps}

    def note(self, step: int, loss: float, gradient_norm: float) -> None:
        """Count a step that the optimizer skipped, because the norm is not finite; `step`: with it finished ones.

        Raises UserError on all ranks when it is one too many, or where the gradient does not show what the loss does:
        before weights that are lost take the place of a good checkpoint.
        """
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            return
        limit = self.config.reliability.max_skipped_steps
        self.skipped_steps += 1
        if self.skipped_steps <= limit and not math.isfinite(gradient_norm):
            return
        found = f"the loss is {loss} and the gradient norm {gradient_norm} at step {step}"
        if limit:
            found += f", skipped step {self.skipped_steps} of the run (reliability.max_skipped_steps = {limit})"
        saved = f"step {finished_steps(self.config)} is saved in {run_folder(self.config)}"
        suggestion = f"a lower optimizer.learning_rate or a longer warm-up, as another run ({saved})"
        raise UserError(Problem("training", found, suggestion), on_all_ranks=True)
