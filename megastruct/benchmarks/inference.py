"""Speed of inference on random weights: decoding at many batch sizes, and reading prompts.

Decoding is measured step by step on a cache that is filled already, at a few lengths of the rows. Choosing the
likeliest token is part of a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megastruct.config.schema import Config
from megastruct.errors import Problem, UserError
from megastruct.inference.decoder import Decoder
from megastruct.inference.forms import Form, use_form
from megastruct.models.gpt import GPT

SPARE_BYTES = 3 << 30  # for what a step makes besides the cache
TIMED_SECONDS = 0.15
ROUNDS = 3
LENGTHS = 4


class Decoding(NamedTuple):
    """Decoding with one batch size: seconds of a step, averaged over the continuation."""

    batch: int
    step_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows per second."""
        return self.batch / self.step_seconds


def random_model(config: Config, form: Form, device: torch.device, dtype: torch.dtype) -> GPT:
    """A model in eval mode whose weights are drawn on the device; speed does not depend on how they are drawn."""
    with torch.device(device):
        model = GPT(config, init=False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.requires_grad_(False).parameters():
        parameter.normal_(0.0, 0.02, generator=generator)
    use_form(model.eval(), form, dtype)
    return model.to(dtype)


def measure_decoding(
    config: Config,
    form: Form,
    batches: Sequence[int],
    prompt: int,
    new_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Decoding]:
    """Decode `new_tokens` after prompts of `prompt` tokens, for each batch size that fits; 0 stands for the largest.

    Yields each result as soon as it is known; a batch that does not fit is left out.
    """
    decoder = Decoder(random_model(config, form, device, dtype), config)
    largest = largest_batch(decoder, prompt + new_tokens)
    for batch in batches:
        if batch <= largest:
            yield Decoding(batch or largest, step_seconds(decoder, batch or largest, prompt, new_tokens))


def largest_batch(decoder: Decoder, num_slots: int) -> int:
    """Rows of `num_slots` tokens whose cache fits into the device's free memory; a multiple of 8. 4,096 on a CPU."""
    if decoder.device.type != "cuda":
        return 4096
    torch.cuda.empty_cache()
    row_bytes = decoder.new_cache(1, num_slots).num_bytes
    logits_bytes = 6 * decoder.config.model.vocab_size  # in the model's dtype, and once more in float32
    free, _ = torch.cuda.mem_get_info(decoder.device)
    return int((free - SPARE_BYTES) // (row_bytes + logits_bytes) // 8 * 8)


def step_seconds(decoder: Decoder, batch: int, prompt: int, new_tokens: int) -> float:
    """Seconds of a step, averaged over a continuation of `new_tokens` of `batch` rows.

    A step's time grows with the length of the rows; it is measured in the middle of `LENGTHS` equal parts.
    """
    torch.compiler.reset()  # as in a process that decodes this batch alone
    cache = decoder.new_cache(batch, prompt + new_tokens)
    ids = torch.zeros(batch, dtype=torch.int64, device=decoder.device)

    def step(length: int) -> None:
        ids.copy_(decoder.step(ids, [length] * batch, cache).argmax(-1))

    lengths = [prompt + int(new_tokens * (part + 0.5) / LENGTHS) for part in range(LENGTHS)]
    return sum(best_seconds(partial(step, length), decoder.device) for length in lengths) / LENGTHS


class Prefill(NamedTuple):
    """Reading prompts: `batch` of them, of `length` tokens."""

    batch: int
    length: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all prompts per second."""
        return self.batch * self.length / self.seconds


def measure_prefill(
    config: Config, form: Form, batches: Sequence[int], length: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Prefill]:
    """Read prompts of `length` tokens, for each batch size."""
    decoder = Decoder(random_model(config, form, device, dtype), config)
    for batch in batches:
        cache = decoder.new_cache(batch, length)
        prompts = [[index % config.model.vocab_size for index in range(length)]] * batch
        yield Prefill(batch, length, best_seconds(partial(decoder.read_prompts, prompts, cache), device))


def measure_transformers(
    folder: Path, batches: Sequence[int], prompt: int, new_tokens: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Decoding]:
    """Decode with transformers' own `generate` (greedy, with its default cache) on an exported folder.

    The time of a step is that of a whole call without reading the prompt, divided by the new tokens. Raises UserError
    if the folder cannot be loaded.
    """
    try:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        model = model.to(device).eval()
    except ModuleNotFoundError:
        raise UserError(Problem("transformers", "not installed", "pip install 'megastruct[huggingface]'")) from None
    except (OSError, ValueError) as error:
        found = f"{folder}: {str(error).splitlines()[0]}"
        raise UserError(Problem("--transformers", found, "a folder of tools/export.py, in its merged form")) from None
    for batch in batches:
        ids = torch.ones(batch, prompt, dtype=torch.int64, device=device)

        def run(count: int, ids: torch.Tensor = ids) -> None:
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)

        with torch.inference_mode():
            first, whole = (best_seconds(partial(run, count), device) for count in (1, new_tokens + 1))
        yield Decoding(batch, (whole - first) / new_tokens)


def best_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call: the fastest of several rounds of as many calls as fill a fraction of a second."""
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def timed(calls: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        wait()
        return (time.perf_counter() - start) / calls

    timed(1)  # compiles and captures
    calls = max(1, math.ceil(TIMED_SECONDS / timed(1)))
    return min(timed(calls) for _ in range(ROUNDS))
