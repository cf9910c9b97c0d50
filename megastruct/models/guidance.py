"""Decides what the guides do in each forward, on the host and in advance, by pure functions of names.

A decision is a hash of (seed, step, micro-batch, block, linear). Micro-batches are numbered over all replicas, so that
every layout decides alike. There is no generator whose state a resume could lose or a second forward could advance.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from megastruct.config.schema import Config, GuidedConfig
from megastruct.parallel.seeds import derive_seed
from megastruct.structures.guide import Choice, Rows

LINEARS = ("fc1", "fc2")
BlockChoices = tuple[Choice | None, Choice | None]  # of fc1 and fc2; None: not evaluated
NOT_EVALUATED: BlockChoices = (None, None)


def is_guide(parameter_name: str) -> bool:
    """Whether a parameter belongs to a guide, from its global name."""
    return parameter_name.endswith(tuple(f"{linear}_guide.weight" for linear in LINEARS))


class Decision(NamedTuple):
    """In every run of `levels` positions, `level` of them are guided, cyclically from `offset` on."""

    level: int
    levels: int
    offset: int = 0

    @property
    def share(self) -> float:
        """The share of positions that are guided."""
        return self.level / self.levels


def decide(
    guided: GuidedConfig, alpha: float, seed: int, step: int, micro_batch: int, block: int, linear: str
) -> Decision:
    """What one guide does in the forward of one micro-batch (numbered over all replicas) of one step.

    rows: a share of the tokens is guided. It is alpha, rounded up or down at random to a multiple of 1/levels so that
    its mean is alpha. Both linears of a block have the same share, but different offsets. coin: all tokens are guided
    with probability alpha (arXiv 2406.16450, section 3). none: all tokens are always guided.
    """
    if guided.skip == "none":
        return Decision(1, 1)
    if guided.skip == "coin":
        return Decision(int(_uniform(seed, "guide", step, micro_batch, block, linear) < alpha), 1)
    levels = guided.levels
    level = min(levels, int(alpha * levels + _uniform(seed, "guide level", step, micro_batch, block)))
    return Decision(level, levels, derive_seed(seed, "guide offset", step, micro_batch, block, linear) % levels)


class Guidance:
    """One rank's decisions as tensors on its device: given the step, it returns the choices of each forward."""

    def __init__(
        self, config: Config, tp_size: int, replica: int, num_replicas: int, device: torch.device | str = "cpu"
    ) -> None:
        self.config, self.tp_size, self.device = config, tp_size, torch.device(device)
        self.replica, self.num_replicas = replica, num_replicas
        self._rows = cache(self._make_rows)
        self._share_sum, self._shares = 0.0, 0
        self.start_evaluation(0.0)

    def start_step(self, step: int, alpha: float) -> None:
        """Start a training step: the next forwards are its micro-batches, in their order."""
        self.step: int | None = step
        self.next_micro_batch = self.replica
        self._set_alpha(alpha)

    def start_evaluation(self, alpha: float) -> None:
        """Start an evaluation: in the next forwards guides see all tokens with this `alpha`, or none if it is 0."""
        self.step = None
        self._set_alpha(alpha)

    def choices(self) -> list[BlockChoices]:
        """The choices of every block in the next forward."""
        blocks = range(self.config.model.num_layers)
        if self.step is None:
            all_tokens = Choice(self._alpha_tensor, None, None)
            return [(all_tokens, all_tokens) if self.alpha else NOT_EVALUATED for _ in blocks]
        micro_batch = self.next_micro_batch
        self.next_micro_batch += self.num_replicas
        return [self._block_choices(micro_batch, block) for block in blocks]

    def read_share(self) -> float:
        """The share of tokens that guides saw in the training forwards since the last call."""
        share = self._share_sum / self._shares if self._shares else 0.0
        self._share_sum, self._shares = 0.0, 0
        return share

    def _set_alpha(self, alpha: float) -> None:
        self.alpha = alpha
        self._alpha_tensor: Tensor = torch.full((), alpha, device=self.device)  # a fill: nothing waits for a copy

    def _block_choices(self, micro_batch: int, block: int) -> BlockChoices:
        if self.config.ffn.of_block(block).is_dense:
            return NOT_EVALUATED
        assert self.step is not None
        seed = self.config.run.seed
        decisions = [
            decide(self.config.guided, self.alpha, seed, self.step, micro_batch, block, linear) for linear in LINEARS
        ]
        self._share_sum += sum(decision.share for decision in decisions)
        self._shares += len(decisions)
        fc1, fc2 = (self._choice(decision, linear) for decision, linear in zip(decisions, LINEARS, strict=True))
        return fc1, fc2

    def _choice(self, decision: Decision, linear: str) -> Choice | None:
        if decision.level == 0:
            return None
        if decision.level == decision.levels:
            return Choice(self._alpha_tensor, None, None)
        whole = self.config.training.seq_length
        own = whole // self.tp_size
        return Choice(
            self._alpha_tensor, self._rows(own, decision, linear, "own"), self._rows(whole, decision, linear, "whole")
        )

    def _make_rows(self, length: int, decision: Decision, *_owner: str) -> Rows:
        # Every owner has tensors of its own: a block that got the same tensor twice would be compiled anew.
        return rows(length, decision, self.device)


def rows(length: int, decision: Decision, device: torch.device | str = "cpu") -> Rows:
    """The guided positions of a sequence of `length`, which is a multiple of the levels, on `device`.

    Every rank's part of a sequence has the same ones, so that together they are those of the whole sequence.
    """
    position = torch.arange(length)
    mask = (position - decision.offset) % decision.levels < decision.level
    place = torch.where(mask, mask.cumsum(0) - 1, 0)
    taken = position[mask].to(device)
    torch._dynamo.maybe_mark_dynamic(taken, 0)  # one compiled block for all levels
    return Rows(taken, place.to(device), mask.float().to(device))


def _uniform(*names: str | int) -> float:
    """In [0, 1), from 53 bits of the names' hash."""
    return (derive_seed(*names) >> 11) * 2.0**-53
