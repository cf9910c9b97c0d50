"""What attention within documents costs: forward and backward of a training step with it and without it.

The model of a config runs on one device, on random ids with geometrically distributed document lengths. The variants
run in turn, and each variant's fastest step counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megastruct.config.schema import Config
from megastruct.models.block import compile_blocks
from megastruct.models.gpt import GPT
from megastruct.planning.cost import has_block_kernel

EOD = 2
NUM_BATCHES = 8  # each with different document borders
WARM_UP_ROUNDS = 2


class Way(NamedTuple):
    """One variant of attention: its fastest step, and the peak memory that its last step allocated (0 on the CPU)."""

    name: str
    milliseconds: float
    peak_bytes: int


def measure(config: Config, mean_tokens: float, rounds: int, device: torch.device) -> list[Way]:
    """Time steps of one micro-batch: across borders, with a dense mask, and with FlexAttention's kernel where it runs.

    Args:
        config: sets the model, the micro-batch, the precision and compilation.
        mean_tokens: mean length of a document, at least 1.
        rounds: measured steps of each variant, after 2 that warm up.
        device: where the steps run.
    """
    ways = {"across borders": _model(config, None, device), "inside, dense mask": _model(config, EOD, device)}
    on_gpu_in_bf16 = device.type == "cuda" and config.training.precision == "bf16"
    if on_gpu_in_bf16 and has_block_kernel(config.model.attention_head_dim):
        ways["inside, kernel"] = _model(config, EOD, device)
    ways["inside, dense mask"].head_dim = 0  # which switches the kernel off
    ids = draw_rows(config, mean_tokens).to(device)
    best = {name: float("inf") for name in ways}
    peak = dict.fromkeys(ways, 0)
    for round_ in range(WARM_UP_ROUNDS + rounds):
        for name, model in ways.items():
            seconds, peak[name] = _step(model, ids[round_ % NUM_BATCHES], device)
            if round_ >= WARM_UP_ROUNDS:
                best[name] = min(best[name], seconds)
    return [Way(name, 1000 * best[name], peak[name]) for name in ways]


def draw_rows(config: Config, mean_tokens: float) -> Tensor:
    """Random ids, int64 [NUM_BATCHES, b, s]; every token ends a document with probability 1 / mean_tokens."""
    training, generator = config.training, torch.Generator().manual_seed(0)
    shape = (NUM_BATCHES, training.micro_batch_size, training.seq_length)
    ids = torch.randint(EOD + 1, config.model.vocab_size, shape, generator=generator)
    return ids.masked_fill_(torch.rand(shape, generator=generator) < 1 / mean_tokens, EOD)


def _model(config: Config, eod_id: int | None, device: torch.device) -> GPT:
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    model = GPT(config, eod_id=eod_id).to(device, dtype)
    if config.training.compile:
        compile_blocks(model, config.training.seq_length, device)
    return model


def _step(model: GPT, ids: Tensor, device: torch.device) -> tuple[float, int]:
    """(seconds, peak bytes) of a forward and backward."""
    cuda = device.type == "cuda"
    wait: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if cuda else 0
    wait()
    start = time.perf_counter()
    model(ids).square().mean().backward()
    wait()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds, (torch.cuda.max_memory_allocated() - held) if cuda else 0
