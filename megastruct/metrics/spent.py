"""What a run has cost so far, over all its restarts: time, devices and FLOPs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

_KEY = "spent"
_KINDS = ("wall_time_seconds", "device_hours", "training_flops")


class Spent:
    """Sums over the steps up to the present one, and over those that were repeated after a spike.

    Steps that a crash lost are not in the checkpoint that the run resumes from, so they count once.
    The time is that of the loop: steps, validation and waiting for saves, but not the start. A run that began before
    this was counted has unknown sums.
    """

    def __init__(
        self, num_devices: int, flops_per_step: float, guide_flops_per_step: float, state: Mapping[str, Any], step: int
    ) -> None:
        """
        Args:
            num_devices: devices of all ranks.
            flops_per_step: training FLOPs of a step with a full batch, without guides.
            guide_flops_per_step: those that guides add if they are evaluated for all tokens.
            state: plain values of the checkpoint that was loaded, {} without one.
            step: finished steps.
        """
        self.num_devices, self.flops_per_step, self.guide_flops = num_devices, flops_per_step, guide_flops_per_step
        unknown = dict.fromkeys(_KINDS) if step else dict.fromkeys(_KINDS, 0.0)
        self._sums: dict[str, float | None] = {**unknown, **state.get(_KEY, {})}
        self.start()

    def start(self) -> None:
        """Count the time from now on."""
        self._since = time.perf_counter()

    def step(self, guide_share: float, batch_share: float = 1.0) -> None:
        """Count a step, in which guides were evaluated for this share of the tokens.

        `batch_share`: the size of its batch as a share of the full one.
        """
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        flops = batch_share * (self.flops_per_step + guide_share * self.guide_flops)
        for kind, value in zip(_KINDS, (seconds, seconds * self.num_devices / 3600, flops), strict=True):
            before = self._sums[kind]
            self._sums[kind] = None if before is None else before + value

    def read(self) -> dict[str, float | None]:
        """The sums by metric name; None where they are unknown."""
        return dict(self._sums)

    def state(self) -> dict[str, Any]:
        """The plain values that a checkpoint stores."""
        return {_KEY: self.read()}
