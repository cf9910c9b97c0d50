"""The collectives on real ranks: forward against plain slicing and summing, backward as the exact adjoint."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from megastruct.parallel.collectives import (
    all_reduce,
    count_bytes,
    features_to_tokens,
    gather_sequence,
    gather_tokens,
    reduce_scatter_sequence,
    sum_gradient,
)
from megastruct.parallel.groups import TensorGroup
from ranks import run_ranks
from sharded import world

# name -> (function, shape of x on a rank, shape of y on a rank), with s = 12 or T = 12 tokens and c = 6 features
SHAPES: dict[str, tuple[Callable[..., Tensor], Callable[[int], Any], Callable[[int], Any]]] = {
    "gather_sequence": (gather_sequence, lambda tp: (12 // tp, 2, 6), lambda tp: (12, 2, 6)),
    "reduce_scatter_sequence": (reduce_scatter_sequence, lambda tp: (12, 2, 6), lambda tp: (12 // tp, 2, 6)),
    "gather_tokens": (gather_tokens, lambda tp: (6, 12 // tp), lambda tp: (6, 12)),
    "features_to_tokens": (features_to_tokens, lambda tp: (6 // tp, 12), lambda tp: (6, 12 // tp)),
}


def wanted(name: str, xs: list[Tensor]) -> list[Tensor]:
    """The outputs of all ranks from the inputs of all ranks, integers, so exact."""
    tp = len(xs)
    if name == "gather_sequence":
        return [torch.cat(xs)] * tp
    if name == "reduce_scatter_sequence":
        return list(torch.stack(xs).sum(0).chunk(tp))
    if name == "gather_tokens":
        return [torch.cat(xs, 1)] * tp
    return list(torch.cat(xs).chunk(tp, 1))


def integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


Exchanges = dict[tuple[str, torch.dtype], tuple[Tensor, Tensor, Tensor, Tensor]]
DTYPES = (torch.float32, torch.bfloat16)


def exchange() -> Exchanges:
    """(name, dtype) -> (x, y, gradient of y, gradient of x), with non-contiguous x and gradient."""
    tp = world()
    results: Exchanges = {}
    for (name, (function, x_shape, y_shape)), dtype in product(SHAPES.items(), DTYPES):
        x = integers(*reversed(x_shape(tp.size)), seed=tp.rank).to(dtype)
        x = x.permute(*reversed(range(x.dim()))).requires_grad_()
        g = integers(*reversed(y_shape(tp.size)), seed=100 + tp.rank).to(dtype)
        g = g.permute(*reversed(range(g.dim())))
        y = function(x, tp)
        [gradient] = torch.autograd.grad(y, x, g)
        assert y.dtype == gradient.dtype == dtype
        results[name, dtype] = (x.detach(), y.detach(), g, gradient)
    return results


@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_forward_and_adjoint(tp_size: int) -> None:
    results = run_ranks(tp_size, exchange)
    for name, dtype in product(SHAPES, DTYPES):
        xs, ys, gs, gradients = zip(*(result[name, dtype] for result in results), strict=True)
        for y, y_wanted in zip(ys, wanted(name, list(xs)), strict=True):
            assert torch.equal(y, y_wanted), name
        # <g, y(x)> = <gradient, x> over all ranks, for a linear y; the integers are small enough for exact sums
        left = sum(float((g.double() * y.double()).sum()) for g, y in zip(gs, ys, strict=True))
        right = sum(float((g.double() * x.double()).sum()) for g, x in zip(gradients, xs, strict=True))
        assert left == right, name


def reductions() -> dict[str, Any]:
    tp = world()
    w = torch.full((3,), 2.0, requires_grad=True)
    with count_bytes() as outer:
        with count_bytes() as inner:
            y = sum_gradient(w, tp)
        (y * (tp.rank + 1)).sum().backward()
    x = torch.tensor([float(tp.rank), -float(tp.rank)])
    return {
        "identity": torch.equal(y, w),
        "gradient": w.grad,
        "sum": all_reduce(x, tp),
        "max": all_reduce(x, tp, "max"),
        "kept": x,
        "bytes": (inner, outer),
    }


def test_reductions_and_counting() -> None:
    for rank, result in enumerate(run_ranks(3, reductions)):
        assert result["identity"]
        assert result["gradient"].tolist() == [6.0] * 3  # 1 + 2 + 3
        assert result["sum"].tolist() == [3.0, -3.0]
        assert result["max"].tolist() == [2.0, 0.0]
        assert result["kept"].tolist() == [float(rank), -float(rank)]
        assert result["bytes"] == ([], [("all_reduce", 2 * 2 * 12 // 3)])


def test_one_rank_needs_no_group_and_copies_nothing() -> None:
    x, tp = torch.ones(2, 4, requires_grad=True), TensorGroup()
    assert all(function(x, tp) is x for function, *_ in SHAPES.values())
    assert sum_gradient(x, tp) is x and all_reduce(x, tp) is x


def test_a_group_of_several_needs_a_process_group() -> None:
    with pytest.raises(AssertionError, match="needs a process group"):
        gather_sequence(torch.ones(2), TensorGroup(None, 2, 0))
