"""Embedding, output head and cross-entropy over a sharded vocabulary, also where the ranks' shares differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megastruct.layers.embedding import Embedding
from megastruct.layers.vocabulary import (
    VocabParallelEmbedding,
    VocabParallelHead,
    vocab_parallel_cross_entropy,
    vocab_parallel_cross_entropy_and_z,
)
from megastruct.models.loss import cross_entropy
from megastruct.parallel.collectives import count_bytes
from megastruct.parallel.groups import TensorGroup
from megastruct.parallel.sizes import words_per_rank
from megastruct.structures.dense.layers import Linear
from ranks import run_ranks
from sharded import BATCH, SEQUENCE, Part, assemble, draw, own, run_part, world

HIDDEN = 8
Z_LOSS = 0.1
VOCAB_SIZES = (12, 13, 14)  # over 1, 2, 3 and 4 ranks: equal shares, and shorter last ones


def every_word(vocab_size: int) -> Tensor:
    """int64 [b, s] in which each word occurs, most of them twice."""
    order = torch.randperm(BATCH * SEQUENCE, generator=torch.Generator().manual_seed(1))
    return (order % vocab_size).view(BATCH, SEQUENCE)


class TiedEnds(nn.Module):
    """Embedding and tied head around nothing: uses the weight twice."""

    def __init__(self, embedding: nn.Module, vocab_size: int) -> None:
        super().__init__()
        embedding.init_weights((1, "weights", "embedding"))  # type: ignore[operator]
        self.embedding = embedding.double()
        self.vocab_size = vocab_size

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding.project(x + self.embedding(every_word(self.vocab_size)))


def words_of(full: Tensor, tp: TensorGroup, vocab_size: int) -> Tensor:
    """The rank's part of logits [..., V]."""
    return full.split(words_per_rank(vocab_size, tp.size), dim=-1)[tp.rank]


def all_vocabulary_parts() -> list[dict[str, Any]]:
    return [vocabulary_parts(vocab_size) for vocab_size in VOCAB_SIZES]


def vocabulary_parts(vocab_size: int) -> dict[str, Any]:
    tp = world()
    x, g = draw(SEQUENCE, BATCH, HIDDEN, seed=1), draw(SEQUENCE, BATCH, vocab_size, seed=2)
    embedding = VocabParallelEmbedding(vocab_size, HIDDEN, tp)
    head = VocabParallelHead(HIDDEN, vocab_size, tp)
    head.init_weights((1, "weights", "head"))
    parts: dict[str, Any] = {
        "tied": run_part(TiedEnds(embedding, vocab_size), own(x, tp, 0), words_of(g, tp, vocab_size)),
        "head": run_part(head.double(), own(x, tp, 0), words_of(g, tp, vocab_size)),
        "embedded": embedding(every_word(vocab_size)).detach(),
    }
    for dtype, scale in ((torch.float32, 3), (torch.float32, 3e4), (torch.bfloat16, 3)):
        logits = words_of(g.to(dtype) * scale, tp, vocab_size).clone().requires_grad_()
        with count_bytes() as sent:
            loss = vocab_parallel_cross_entropy(logits, every_word(vocab_size), vocab_size, tp)
        (loss * 2).backward()
        parts[f"{dtype} {scale}"] = loss.detach(), logits.grad, sent
        logits = logits.detach().clone().requires_grad_()
        with count_bytes() as sent_with_z:
            with_z, z = vocab_parallel_cross_entropy_and_z(logits, every_word(vocab_size), vocab_size, tp, Z_LOSS)
        (with_z * 2).backward()
        assert sent_with_z == sent and torch.equal(with_z, loss) and not z.requires_grad
        parts[f"{dtype} {scale} z"] = z, logits.grad
    return parts


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_vocabulary(tp_size: int) -> None:
    everything = run_ranks(tp_size, all_vocabulary_parts)
    for i, vocab_size in enumerate(VOCAB_SIZES):
        check_vocabulary([result[i] for result in everything], vocab_size)


def check_vocabulary(results: list[dict[str, Any]], vocab_size: int) -> None:
    x, g = draw(SEQUENCE, BATCH, HIDDEN, seed=1), draw(SEQUENCE, BATCH, vocab_size, seed=2)
    module = TiedEnds(Embedding(vocab_size, HIDDEN), vocab_size)
    check_ends([result["tied"] for result in results], run_part(module, x, g), "embedding.weight")
    embedded = torch.cat([result["embedded"] for result in results])
    assert torch.equal(embedded, module.embedding(every_word(vocab_size)))
    head = Linear(HIDDEN, vocab_size, bias=False)
    head.init_weights((1, "weights", "head"))
    check_ends([result["head"] for result in results], run_part(head.double(), x, g), "weight")
    for dtype, scale in ((torch.float32, 3), (torch.float32, 3e4), (torch.bfloat16, 3)):
        check_loss([result[f"{dtype} {scale}"] for result in results], g.to(dtype) * scale, vocab_size)
        check_z([result[f"{dtype} {scale} z"] for result in results], g.to(dtype) * scale, vocab_size)


def check_ends(parts: list[Part], reference: Part, weight: str) -> None:
    joined = torch.cat([part.output for part in parts], -1)
    torch.testing.assert_close(joined, reference.output, rtol=1e-12, atol=1e-12)
    joined = torch.cat([part.input_gradient for part in parts])
    torch.testing.assert_close(joined, reference.input_gradient, rtol=1e-12, atol=1e-12)
    assert torch.equal(assemble(parts, weight, "parameters"), reference.parameters[weight])
    gradient = assemble(parts, weight, "gradients")
    torch.testing.assert_close(gradient, reference.gradients[weight], rtol=1e-12, atol=1e-12)


def check_loss(parts: list[tuple[Tensor, Tensor, list[Any]]], logits: Tensor, vocab_size: int) -> None:
    """Equal bits on all ranks; the loss and its gradient are those of `models.loss.cross_entropy`."""
    whole = logits.detach().requires_grad_()
    wanted = cross_entropy(whole, every_word(vocab_size))
    (wanted * 2).backward()
    assert whole.grad is not None
    for loss, _, sent in parts:
        assert loss.dtype == torch.float32 and torch.equal(loss, parts[0][0])
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-6, atol=1e-6)
        # three float32 per token in two all-reduces
        each = 2 * (len(parts) - 1) * 4 * SEQUENCE * BATCH // len(parts)
        assert sent == ([] if len(parts) == 1 else [("all_reduce", each), ("all_reduce", 2 * each)])
    gradient = torch.cat([gradient for _, gradient, _ in parts], -1)
    assert gradient.dtype == logits.dtype
    bound = {torch.float32: 1e-7, torch.bfloat16: 1e-3}[logits.dtype]  # entries are at most 2 / tokens = 0.08
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-5 if bound == 1e-7 else 1e-2, atol=bound)


def check_z(parts: list[tuple[Tensor, Tensor]], logits: Tensor, vocab_size: int) -> None:
    """The z term, and the gradient of both terms, are those of float64."""
    whole = logits.detach().double().requires_grad_()
    log_sum = whole.logsumexp(-1)
    z = Z_LOSS * log_sum.square().mean()
    of_label = whole.gather(-1, every_word(vocab_size).t()[..., None])[..., 0]
    (2 * ((log_sum - of_label).mean() + z)).backward()
    assert whole.grad is not None
    for found, _ in parts:
        assert torch.equal(found, parts[0][0])
        torch.testing.assert_close(found.double(), z.detach(), rtol=1e-6, atol=1e-6)
    gradient = torch.cat([gradient for _, gradient in parts], -1)
    assert gradient.dtype == logits.dtype
    bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[logits.dtype]
    torch.testing.assert_close(
        gradient.double(), whole.grad, rtol=bound, atol=bound / 100 * float(whole.grad.abs().max())
    )


COMPILED_LOSS = torch.compile(vocab_parallel_cross_entropy, backend="aot_eager", fullgraph=True)


def compiled_loss() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tp = world()
    results: list[Tensor] = []
    for function in (vocab_parallel_cross_entropy, COMPILED_LOSS):
        logits = words_of(draw(SEQUENCE, BATCH, 13, seed=2).bfloat16(), tp, 13).clone().requires_grad_()
        loss = function(logits, every_word(13), 13, tp)
        loss.backward()
        assert logits.grad is not None
        results += [loss.detach(), logits.grad]
    return results[0], results[1], results[2], results[3]


def test_compiled_loss() -> None:
    for loss, gradient, compiled_loss_, compiled_gradient in run_ranks(2, compiled_loss):
        torch.testing.assert_close(loss, compiled_loss_)
        torch.testing.assert_close(gradient, compiled_gradient)


def test_a_rank_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight \[9, 8\] does not divide over 4 ranks"):
        VocabParallelEmbedding(9, HIDDEN, TensorGroup(None, 4, 0))  # shares of 3, 3, 3 and 0
