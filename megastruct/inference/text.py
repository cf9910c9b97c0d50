"""Continue texts with a loaded model: tokens to text as they come, and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megastruct.data import Tokenizer
from megastruct.errors import Problem, UserError
from megastruct.inference.decoder import Decoder
from megastruct.inference.generate import Continuation, Limits, Reason, generate
from megastruct.inference.load import Loaded
from megastruct.inference.sampling import Sampling, option

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what the decoder makes of an incomplete character


@dataclass(frozen=True)
class Text:
    """The continuation of one prompt; `text` ends before the stop string that ended it, if one did."""

    prompt: str
    text: str
    num_tokens: int
    reason: Reason


class TextGenerator:
    """A loaded model that continues texts. Making it reads nothing; `compiled` as in `Decoder`."""

    def __init__(self, loaded: Loaded, compiled: bool | None = None) -> None:
        self.loaded, self.decoder = loaded, Decoder(loaded.model, loaded.config, compiled)

    def __call__(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 40,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        batch_size: int = 16,
        on_text: Callable[[int, str], None] = lambda prompt, text: None,
    ) -> list[Text]:
        """Continue each of `prompts`. `on_text(prompt's index, new text)` is called as soon as text is certain.

        An empty prompt starts a new document. Raises UserError for prompts that are no strings or do not fit the
        context, for numbers below 1, and for stop strings or ids that cannot occur.
        """
        _refuse_numbers(max_new_tokens=max_new_tokens, batch_size=batch_size)
        if isinstance(prompts, str):  # which is a sequence of strings, too: its characters
            prompts = [prompts]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(Problem("--prompt", "not a list of strings", "continue_ids, which takes token ids"))
        refuse_stops(stop, stop_ids, self.loaded.config.model.vocab_size)
        tokenizer = self.loaded.tokenizer
        ids = [begun(tokenizer, found.tolist()) for found in tokenizer.encode(list(prompts))]
        _refuse_long(prompts, ids, self.loaded.config.training.seq_length)
        made = self.continue_ids(ids, max_new_tokens, sampling or Sampling(), stop, stop_ids, batch_size, on_text)
        return [
            Text(prompt, text, len(continuation.ids), continuation.reason)
            for prompt, (text, continuation) in zip(prompts, made, strict=True)
        ]

    def continue_ids(
        self,
        ids: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        batch_size: int = 16,
        on_text: Callable[[int, str], None] = lambda prompt, text: None,
    ) -> list[tuple[str, Continuation]]:
        """(text, tokens and reason) of what follows each prompt, given as at least one token id.

        Raises ValueError for a prompt that leaves no room for a token in the context, UserError for ids that are not
        one list for each prompt, and for stop strings or ids that cannot occur.
        """
        tokenizer, config = self.loaded.tokenizer, self.loaded.config
        ids = [own.tolist() if hasattr(own, "tolist") else own for own in ids]
        if not all(isinstance(own, Sequence) and not isinstance(own, str) for own in ids):
            raise UserError(Problem("ids", "not a list of ids for each prompt", "[ids] for a single prompt"))
        refuse_stops(stop, stop_ids, config.model.vocab_size)
        streams = [TextStream(tokenizer, own, stop) for own in ids]

        def accept(prompt: int, token: int) -> bool:
            if new := streams[prompt].add(token):
                on_text(prompt, new)
            return not streams[prompt].stopped

        num_words = min(tokenizer.vocab_size, config.model.vocab_size)
        limits = Limits(max_new_tokens, config.training.seq_length, num_words, tokenizer.eod_id, tuple(stop_ids))
        made = generate(self.decoder, ids, limits, sampling, batch_size, accept)
        for index, stream in enumerate(streams):
            if rest := stream.finish():
                on_text(index, rest)
        return [(stream.text, continuation) for stream, continuation in zip(streams, made, strict=True)]


def begun(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The ids of a text at the beginning of a document, which are at least one."""
    return [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *ids] or [tokenizer.eod_id]


class TextStream:
    """The text of a continuation, token by token. What may still become part of a stop string is held back.

    Tokens are decoded together with a few before them, because a token's text depends on what it follows: a character
    may take several tokens, and the space before a word is lost at the beginning of a text. What is decoded together
    begins with a whole character, because some decoders lose every byte behind one that they do not understand.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop, self.text, self.stopped = tokenizer, [each for each in stop if each], "", False
        self._ids = _last_characters(tokenizer, prompt)
        self._done = len(self._ids)  # decoded: `_ids[:_done]`
        self._held = ""

    def add(self, token: int) -> str:
        """The text that has become certain."""
        self._ids.append(token)
        before, after = (self.tokenizer.decode(ids) for ids in (self._ids[: self._done], self._ids))
        if after.endswith(REPLACEMENT) and len(self._ids) - self._done < 8:
            return ""  # more bytes of the character follow
        if len(after) > len(before):  # a special token has no text that keeps the space after it
            self._ids = self._ids[self._done :]
        self._done = len(self._ids)
        self._held += after[len(before) :]
        ends = [place for each in self.stop if (place := self._held.find(each)) >= 0]
        if ends:
            self.stopped = True
            return self._release(self._held[: min(ends)], "")
        keep = max((_overlap(self._held, each) for each in self.stop), default=0)
        return self._release(self._held[: len(self._held) - keep], self._held[len(self._held) - keep :])

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        before, after = (self.tokenizer.decode(ids) for ids in (self._ids[: self._done], self._ids))
        self._done = len(self._ids)
        return self._release(self._held + after[len(before) :], "")

    def _release(self, text: str, held: str) -> str:
        self.text, self._held = self.text + text, held
        return text


def _last_characters(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Up to 8 of the last tokens, from the beginning of a character on."""
    last = list(ids)[-8:]
    starts = [start for start in range(len(last)) if not tokenizer.decode(last[start:]).startswith(REPLACEMENT)]
    return last[starts[0] :] if starts else []


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


def _refuse_numbers(**numbers: int) -> None:
    problems = [
        Problem(option(name), f"{value} is less than 1", f"{option(name)} 16")
        for name, value in numbers.items()
        if value < 1
    ]
    if problems:
        raise UserError(problems)


def refuse_stops(stop: Sequence[str], stop_ids: Sequence[int], vocab_size: int) -> None:
    """Raises UserError for empty stop strings and ids that are not in the vocabulary."""
    problems = [Problem("--stop", "an empty string, which would end every text", "leave it out")] * ("" in stop)
    problems += [
        Problem("--stop-id", f"{token} is not an id of the vocabulary", f"--stop-id from 0 to {vocab_size - 1}")
        for token in stop_ids
        if not 0 <= token < vocab_size
    ]
    if problems:
        raise UserError(problems)


def _refuse_long(prompts: Sequence[str], ids: Sequence[Sequence[int]], context: int) -> None:
    problems = [
        Problem(
            f"--prompt {prompt[:20] + '...' if len(prompt) > 20 else prompt!r}",
            f"has {len(own)} tokens; a prompt and at least one new token must fit into the {context} of the model",
            f"at most {context - 1} tokens",
        )
        for prompt, own in zip(prompts, ids, strict=True)
        if len(own) >= context
    ]
    if problems:
        raise UserError(problems)
