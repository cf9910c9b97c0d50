"""Sample a continuation of a prompt, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from megastruct.models.gpt import GPT
from megastruct.parallel.seeds import named_generator


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    eod_id: int,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
) -> Tensor:
    """Continue `prompt`: int64 [t] -> int64 [t + n] with n <= max_new_tokens; stops before `eod_id`.

    With `temperature` 0 the likeliest token is taken; otherwise one of the `top_k` likeliest is sampled by a generator
    with the given `seed`. There is no key/value cache: the model reads the whole text again for every token.
    """
    generator = named_generator(seed, "generate")
    ids = prompt.clone()
    for _ in range(max_new_tokens):
        logits = model(ids[None])[-1, 0].float().cpu()  # [s, b, v] -> [v]
        token = _choose(logits, temperature, top_k, generator)
        if token == eod_id:
            break
        ids = torch.cat((ids, ids.new_tensor([token])))
    return ids


def _choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    values, indices = logits.topk(min(top_k, logits.numel()))
    drawn = torch.multinomial((values / temperature).softmax(-1), 1, generator=generator)
    return int(indices[drawn])
