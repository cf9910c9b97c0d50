"""Speed since the last logged step. Only training steps are timed, not validation or checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from megastruct.metrics.stragglers import Parts


@dataclass
class Throughput:
    """Times training steps and computes means over a window.

    Attributes:
        tokens_per_step: tokens of all ranks, with a full batch.
        num_devices: devices of all ranks.
        peak_tflops: peak TFLOP/s of one device; None if unknown.
    """

    tokens_per_step: int
    num_devices: int
    peak_tflops: float | None
    _seconds: float = field(default=0.0, init=False)
    _data_seconds: float = field(default=0.0, init=False)
    _waiting_seconds: float = field(default=0.0, init=False)
    _guide_shares: float = field(default=0.0, init=False)
    _steps: int = field(default=0, init=False)
    _full_batches: float = field(default=0.0, init=False)

    @contextmanager
    def step(self, batch_share: float = 1.0) -> Iterator[None]:
        """Time one training step. The loss must be read inside, so that the device has finished.

        `batch_share`: the size of its batch as a share of the full one.
        """
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start
        self._steps += 1
        self._full_batches += batch_share

    def waited_for_data(self, seconds: float) -> None:
        """Add the seconds that a step waited for its data."""
        self._data_seconds += seconds

    def waited_for_ranks(self, seconds: float) -> None:
        """Add the seconds that a step communicated and waited for other ranks."""
        self._waiting_seconds += seconds

    def guided(self, share: float) -> None:
        """Add the share of a step's tokens, in [0, 1], for which guides were evaluated (self-guided training only)."""
        self._guide_shares += share

    @property
    def guide_share(self) -> float:
        """Mean share over the steps since the last `read`, including steps without guides."""
        return self._guide_shares / max(1, self._steps)

    def parts(self) -> Parts:
        """The parts of this rank's steps since the last `read`."""
        compute = self._seconds - self._data_seconds - self._waiting_seconds
        steps = max(1, self._steps)
        return Parts(compute / steps, self._data_seconds / steps, self._waiting_seconds / steps)

    def read(self, flops_per_token: float) -> dict[str, float | None]:
        """Means over the steps since the last `read`, by metric name; starts the next window.

        `flops_per_token`: training FLOPs of the whole model per token, including those of guides.
        """
        seconds = self._seconds / max(1, self._steps)
        tokens = self.tokens_per_step * self._full_batches
        tokens_per_second = tokens / self._seconds if self._seconds else 0.0
        tflops = tokens_per_second * flops_per_token / self.num_devices / 1e12
        values = {
            "step_time_seconds": seconds,
            "data_wait_seconds": self._data_seconds / max(1, self._steps),
            "tokens_per_second": tokens_per_second,
            "tflops_per_device": tflops,
            "mfu": tflops / self.peak_tflops if self.peak_tflops else None,
        }
        self._seconds, self._data_seconds, self._guide_shares, self._steps = 0.0, 0.0, 0.0, 0
        self._waiting_seconds, self._full_batches = 0.0, 0.0
        return values
