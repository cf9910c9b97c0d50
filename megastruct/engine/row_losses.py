"""The loss of a micro-batch, which can also record the loss of each row, and adds up the z terms of training.

A validation sample is a mixture of sources, and a micro-batch has rows of several. The losses of its rows come from the
logits of the same forward, so the loss of each source costs no forward of its own, and the mean stays as it is.
Shapes: s sequence, b micro-batch, v vocabulary, tp ranks of the tensor-parallel group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megastruct.config.schema import Config
from megastruct.models.loss import cross_entropy, make_loss
from megastruct.parallel.groups import TensorGroup


class RecordingLoss:
    """The training loss (logits [s, b, v/tp], labels int64 [b, s]) -> scalar of `make_loss`."""

    def __init__(self, config: Config, tp: TensorGroup) -> None:
        self.mean = make_loss(config, tp, self._note_z)
        # A compiled loss is not called with a second shape: it would be compiled again, perhaps for any shape.
        self.row_mean = self.mean if tp.size > 1 else cross_entropy
        self.rows: list[Tensor] | None = None
        self.has_z = config.training.z_loss > 0
        self.z_sum: Tensor | float = 0.0
        self.num_z = 0

    def _note_z(self, z: Tensor) -> None:
        if torch.is_grad_enabled():  # in training only
            self.z_sum, self.num_z = self.z_sum + z, self.num_z + 1

    def read_z(self, device: torch.device) -> float:
        """The z term (`training.z_loss`), the mean over all tokens that were trained since the last call.

        Collective over the world; ranks that compute no loss take part with nothing. `device`: this rank's.
        """
        total = torch.tensor([float(self.z_sum), self.num_z], dtype=torch.float64, device=device)
        self.z_sum, self.num_z = 0.0, 0
        dist.all_reduce(total)
        return float(total[0] / total[1])

    @contextmanager
    def recording(self, on: bool = True) -> Iterator[list[Tensor]]:
        """Inside, if `on`, the losses of the rows of each micro-batch are appended to the list: float32 [b].

        The list stays empty on ranks that compute no loss.
        """
        rows: list[Tensor] = []
        self.rows = rows if on else None
        try:
            yield rows
        finally:
            self.rows = None

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over all b x s tokens."""
        if self.rows is not None:
            rows = [self.row_mean(logits[:, [row]], labels[[row]]) for row in range(len(labels))]
            self.rows.append(torch.stack(rows).detach())
        return self.mean(logits, labels)
