"""Continue prompts, given as token ids, in batches of rows of unequal length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from megastruct.inference.decoder import Decoder
from megastruct.inference.sampling import Sampling, Seen, choose
from megastruct.parallel.seeds import named_generator

Reason = Literal["end of document", "stop", "length", "context"]


@dataclass
class Continuation:
    """What follows a prompt.

    Attributes:
        ids: the new tokens, without the one that ended it.
        reason: why it ended: the model ended the document; a stop id or string came; `max_new_tokens` were made; the
            context of the model is full.
    """

    ids: list[int] = field(default_factory=list)
    reason: Reason = "length"


@dataclass(frozen=True)
class Limits:
    """When a continuation ends.

    Attributes:
        max_new_tokens: tokens of one continuation.
        context: tokens of a prompt and its continuation together.
        num_words: only ids below are drawn; a model may have more words than its tokenizer has pieces.
        eod_id: the token that ends a document; None: it is a token like any other.
        stop_ids: other tokens that end a continuation.
    """

    max_new_tokens: int
    context: int
    num_words: int
    eod_id: int | None = None
    stop_ids: tuple[int, ...] = ()


Accept = Callable[[int, int], bool]  # (prompt, token) -> whether to go on


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    sampling: Sampling,
    batch_size: int = 16,
    accept: Accept = lambda prompt, token: True,
) -> list[Continuation]:
    """The continuations of `prompts`, in their order; prompts of similar length share a batch.

    `accept(prompt, token)` is called for each new token as soon as it is known, with the prompt's index; when it
    returns False, the continuation ends with that token, for reason "stop".

    Raises ValueError for an empty prompt, and for one that leaves no room for a token in the context.
    """
    for prompt in prompts:
        if not 0 < len(prompt) < limits.context:
            raise ValueError(f"a prompt of {len(prompt)} tokens: 1 to {limits.context - 1} fit the context")
    results = [Continuation() for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for first in range(0, len(order), batch_size):
        _Batch(decoder, prompts, limits, sampling, order[first : first + batch_size]).run(results, accept)
    return results


class _Batch:
    """The prompts `order` while they are continued together; a prompt's draws depend on its index alone."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        limits: Limits,
        sampling: Sampling,
        order: Sequence[int],
    ) -> None:
        self.decoder, self.limits, self.sampling, self.rows = decoder, limits, sampling, list(order)
        own = [list(prompts[index]) for index in order]
        self.lengths = [len(prompt) for prompt in own]
        self.room = [min(limits.max_new_tokens, limits.context - length) for length in self.lengths]
        slots = max(length + room for length, room in zip(self.lengths, self.room, strict=True))
        self.cache = decoder.new_cache(len(own), slots)
        self.seen = Seen(own, limits.num_words, decoder.device) if sampling.repetition_penalty != 1.0 else None
        draws = [torch.rand(max(self.room), generator=named_generator(sampling.seed, "generate", i)) for i in order]
        self.draws = torch.stack(draws).double().to(decoder.device)
        self.logits = decoder.read_prompts(own, self.cache)

    def run(self, results: list[Continuation], accept: Accept) -> None:
        active, count = list(range(len(self.rows))), 0
        while active:
            if count:
                self._read()
            self._draw(count)
            count += 1
            for row, token in enumerate(self.chosen.tolist()):
                if row not in active:
                    continue
                result, room = results[self.rows[row]], self.room[row]
                reason = self._add(result, self.rows[row], token, accept)
                if reason is None and count == room:
                    reason = "length" if room == self.limits.max_new_tokens else "context"
                if reason is not None:
                    result.reason = reason
                    active.remove(row)
            if active and 2 * len(active) <= len(self.rows) and not self.decoder.compiled:
                self._keep(active)
                active = list(range(len(self.rows)))

    def _draw(self, count: int) -> None:
        """Choose the next token of each row; `count` have been made before."""
        logits = self.logits[:, : self.limits.num_words]
        self.chosen = choose(logits, self.sampling, self.draws[:, count], self.seen)
        if self.seen is not None:
            self.seen.add(self.chosen)

    def _read(self) -> None:
        """Read the chosen tokens."""
        # A row that has ended reads its last slot again and again; nobody looks at what it makes of it.
        lengths = [min(length, self.cache.num_slots - 1) for length in self.lengths]
        self.logits = self.decoder.step(self.chosen, lengths, self.cache)
        self.lengths = [length + 1 for length in self.lengths]

    def _add(self, result: Continuation, prompt: int, token: int, accept: Accept) -> Reason | None:
        if token == self.limits.eod_id:
            return "end of document"
        if token in self.limits.stop_ids:
            return "stop"
        result.ids.append(token)
        return None if accept(prompt, token) else "stop"

    def _keep(self, rows: list[int]) -> None:
        """Go on with these rows alone."""
        for name in ("rows", "lengths", "room"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])
        self.cache.keep(rows)
        index = torch.tensor(rows, device=self.chosen.device)
        self.chosen, self.draws = self.chosen[index], self.draws[index]
        if self.seen is not None:
            self.seen.keep(rows)
