"""Choose the next token of each row from its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megastruct.errors import Problem, UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The restrictions are applied in the order in which they stand here.

    Attributes:
        repetition_penalty: the logits of tokens that have occurred are divided by it if positive, multiplied if
            negative; 1 leaves them. Source: Keskar et al. 2019 (arXiv 1909.05858).
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only this many likeliest tokens; 0 takes all.
        top_p: only the likeliest tokens that have this share of the probability together, at least one.
            Source: Holtzman et al. 2020 (arXiv 1904.09751).
        min_p: only tokens with at least this share of the likeliest one's probability.
            Source: Nguyen et al. 2024 (arXiv 2407.01082).
        seed: of the draws; each row has a stream of its own, whatever else is in its batch.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise UserError with all values that are out of range."""
        ranges = (
            ("repetition_penalty", self.repetition_penalty > 0, "above 0", 1.0),
            ("temperature", self.temperature >= 0, "at least 0", 0.8),
            ("top_k", self.top_k >= 0, "at least 0", 40),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1", 1.0),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1", 0.05),
        )
        problems = [
            Problem(option(name), f"{getattr(self, name)} is not {wanted}", f"{option(name)} {suggestion}")
            for name, fits, wanted, suggestion in ranges
            if not fits
        ]
        if problems:
            raise UserError(problems)


def option(name: str) -> str:
    """The command-line option of a field."""
    return "--" + name.replace("_", "-")


SAMPLING_FIELDS = tuple(field.name for field in fields(Sampling))


class Seen:
    """Which tokens have occurred in each row, for the repetition penalty: bool [b, v]."""

    def __init__(self, prompts: Sequence[Sequence[int]], num_words: int, device: torch.device) -> None:
        self.mask = torch.zeros(len(prompts), num_words, dtype=torch.bool)
        for row, prompt in zip(self.mask, prompts, strict=True):
            row[torch.tensor([token for token in prompt if token < num_words], dtype=torch.int64)] = True
        self.mask = self.mask.to(device)

    def add(self, ids: Tensor) -> None:
        """Add one token of each row, int64 [b]."""
        self.mask.scatter_(1, ids[:, None], True)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        self.mask = self.mask[torch.tensor(rows, device=self.mask.device)]


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor, seen: Seen | None = None) -> Tensor:
    """The next token of each row: logits [b, v] of any float dtype -> int64 [b].

    `uniform`: float64 [b] in [0, 1), the draws. `seen`: needed for a repetition penalty.
    """
    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen.mask, penalised, logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    count = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    values, ids = logits.topk(count)  # likeliest first
    probabilities = (values.double() / sampling.temperature).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept = (before < sampling.top_p) & (probabilities >= sampling.min_p * probabilities[:, :1])
    kept[:, 0] = True
    cumulative = (probabilities * kept).cumsum(-1)
    drawn = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(-1, drawn.minimum(kept.sum(-1, keepdim=True) - 1))[:, 0]
