"""A run as a model of EleutherAI's lm-evaluation-harness, registered as `megastruct`.

    import lm_eval, megastruct.evaluation.lm_eval
    lm_eval.simple_evaluate(model="megastruct", model_args="run=runs/quickstart", tasks=["lambada_openai"])

Importing this module needs the extra `lm-eval`. A text that begins without a context is predicted from the
end-of-document token, as the first token of a document is in training; if documents begin with a token of their own,
every text begins with it. Under torchrun every rank gets all requests, computes its share of the batches, and returns
all results.
Shapes: s = tokens of a window, b = windows of a batch, v = vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows
from typing_extensions import override

from megastruct.checkpoint.agreement import gather, rank_in, size_of
from megastruct.errors import Problem, UserError
from megastruct.evaluation.model import open_model
from megastruct.inference.load import DTYPES, Loaded
from megastruct.inference.sampling import Sampling
from megastruct.inference.text import TextGenerator, begun

DEFAULT_BATCH_SIZE = 8
DEFAULT_NEW_TOKENS = 256
_NEW_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # as in other models


class Window(NamedTuple):
    """Tokens that are scored in one row: the last len(targets) positions of `inputs` predict `targets`."""

    request: int
    inputs: list[int]
    targets: list[int]


class Scored(NamedTuple):
    """The log-likelihood of a window's targets in nats, and whether each of them is the likeliest token."""

    request: int
    log_likelihood: float
    is_greedy: bool


@register_model("megastruct")
class MegastructLM(TemplateLM):
    """The newest checkpoint of a run folder, or a checkpoint folder in it."""

    def __init__(
        self,
        run: str | Loaded,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int | str = DEFAULT_BATCH_SIZE,
        max_batch_size: int | None = None,
        allow_guided: bool = False,
        tokenizer: str | None = None,
    ) -> None:
        """
        Args:
            run: the folder, or what `open_model` returned for it.
            device: None: the GPU if there is one.
            dtype: float32 or bfloat16.
            batch_size: rows of a forward; "auto" is the default of 8.
            max_batch_size: given by the harness, and not used.
            allow_guided: load a checkpoint from inside the guided phase.
            tokenizer: a tokenizer file instead of the run's own.

        Raises:
            UserError: the model cannot be loaded, or there is no such dtype.
        """
        super().__init__()
        if dtype not in DTYPES:
            raise UserError(Problem("dtype", f"{dtype} is not supported", " or ".join(DTYPES)))
        if not isinstance(run, Loaded):
            run = open_model(run, device, DTYPES[dtype], allow_guided=allow_guided, tokenizer=tokenizer)
        self.loaded, self.generator = run, TextGenerator(run, compiled=False)
        self.batch_size = int(batch_size) if str(batch_size).isdecimal() else DEFAULT_BATCH_SIZE
        self.max_length = run.config.training.seq_length
        self._device = next(run.model.parameters()).device
        # A model may have more words than its tokenizer has pieces; those are never generated.
        self._num_words = min(run.tokenizer.vocab_size, run.config.model.vocab_size)

    @property
    @override
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.eod_id

    @property
    @override
    def prefix_token_id(self) -> int:
        return begun(self.loaded.tokenizer, [])[0]

    @override
    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.loaded.tokenizer.encode([string])[0].tolist()

    @override
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        windows = [
            window
            for index, (_, context, continuation) in enumerate(requests)
            for window in self._windows(index, self._begun(context), continuation)
        ]
        results = self._score(windows, len(requests))
        for (texts, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    @override
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        # The base class cannot encode an empty continuation behind an empty context.
        empty = {index for index, request in enumerate(requests) if request.args == ("", "")}
        others = [request for index, request in enumerate(requests) if index not in empty]
        results = iter(super().loglikelihood(others, disable_tqdm=disable_tqdm) if others else [])
        return [(0.0, True) if index in empty else next(results) for index in range(len(requests))]

    @override
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = [
            window
            for index, request in enumerate(requests)
            for window in self._windows(index, [self.prefix_token_id], self.tok_encode(request.args[0]))
        ]
        results = [log_likelihood for log_likelihood, _ in self._score(windows, len(requests))]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    @override
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        groups: dict[_Generation, list[int]] = defaultdict(list)  # of this rank's requests
        for index in range(rank_in(), len(requests), size_of()):
            groups[_generation(requests[index].args[1], self.max_length)].append(index)
        own: dict[int, str] = {}
        for how, indices in groups.items():
            # At least half of the model's context is for the prompt: most tasks ask for more tokens than they need.
            room = max(self.max_length - how.max_new_tokens, self.max_length // 2)
            contexts = [self._begun(self.tok_encode(requests[index].args[0])) for index in indices]
            made = self.generator.continue_ids(
                [context[-room:] for context in contexts],
                how.max_new_tokens,
                how.sampling,
                how.stop,
                batch_size=self.batch_size,
            )
            own |= {index: text for index, (text, _) in zip(indices, made, strict=True)}
        texts = {index: text for part in gather(own) for index, text in part.items()}
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[index])
        return [texts[index] for index in range(len(requests))]

    def _begun(self, context: list[int]) -> list[int]:
        """The context as the beginning of a document. The base class gives `prefix_token_id` for an empty one."""
        return context if context[:1] == [self.prefix_token_id] else begun(self.loaded.tokenizer, context)

    def _windows(self, request: int, context: list[int], continuation: list[int]) -> Iterator[Window]:
        """Windows of at most max_length inputs, which together predict every token of the continuation once.

        A context that is too long loses its beginning. A continuation that is too long is cut into windows, of which
        all but the first begin with at least one token before their targets, and the last has as many as fit.
        """
        if len(continuation) > self.max_length:
            for inputs, targets in get_rolling_token_windows(continuation, context[-1], self.max_length, 1):
                yield Window(request, inputs, targets)
        elif continuation:
            tokens = (context + continuation)[-(self.max_length + 1) :]
            yield Window(request, tokens[:-1], continuation)

    def _score(self, windows: Sequence[Window], num_requests: int) -> list[tuple[float, bool]]:
        """The sum over the windows of each request, and whether all its targets are the likeliest tokens."""
        by_length = sorted(windows, key=lambda window: -len(window.inputs))  # little padding; the largest batch first
        batches = [by_length[start : start + self.batch_size] for start in range(0, len(by_length), self.batch_size)]
        own = [scored for batch in batches[rank_in() :: size_of()] for scored in self._score_batch(batch)]
        parts: list[list[Scored]] = [[] for _ in range(num_requests)]
        for scored in (scored for part in gather(own) for scored in part):
            parts[scored.request].append(scored)
        return [
            (math.fsum(scored.log_likelihood for scored in part), all(scored.is_greedy for scored in part))
            for part in parts
        ]

    @torch.no_grad()
    def _score_batch(self, batch: Sequence[Window]) -> list[Scored]:
        longest = max(len(window.inputs) for window in batch)
        # Padding on the right is seen by no token before it.
        ids = torch.tensor([window.inputs + [0] * (longest - len(window.inputs)) for window in batch])
        logits = self.loaded.model(ids.to(self._device))  # [s, b, v]
        found = []
        for row, window in enumerate(batch):
            end = len(window.inputs)
            own = logits[end - len(window.targets) : end, row].float()
            targets = torch.tensor(window.targets, device=self._device)
            log_likelihoods = own.log_softmax(-1).gather(-1, targets[:, None]).double()
            is_greedy = bool((own[:, : self._num_words].argmax(-1) == targets).all())
            found.append(Scored(window.request, float(log_likelihoods.sum()), is_greedy))
        return found


class _Generation(NamedTuple):
    """What a task asks of a continuation."""

    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling


def _generation(options: dict[str, Any], max_length: int) -> _Generation:
    """From a task's `generation_kwargs`: greedy, unless it samples with a temperature above 0."""
    until = options.get("until") or []
    stop = tuple([until] if isinstance(until, str) else until)
    limit = next((int(options[key]) for key in _NEW_TOKENS_KEYS if options.get(key)), DEFAULT_NEW_TOKENS)
    sampling = Sampling(temperature=0)
    if options.get("do_sample") and options.get("temperature", 1.0) > 0:
        temperature, top_p = float(options.get("temperature", 1.0)), float(options.get("top_p", 1.0))
        sampling = Sampling(temperature=temperature, top_k=int(options.get("top_k", 0)), top_p=top_p)
    return _Generation(min(limit, max_length - 1), stop, sampling)
