"""Continue a text, one token after the other."""

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
    """prompt int64 [t] -> int64 [t + n], n <= max_new_tokens; stops before `eod_id`.

    temperature 0 takes the likeliest token; otherwise one of the `top_k` likeliest is drawn from the stream of `seed`.
    The whole text is read again for every token; there is no cache of keys and values.
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
