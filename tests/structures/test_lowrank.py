"""LowRank: output and every gradient against the sums written out; its initialisation against numpy's SVD."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megastruct.structures.lowrank import maths as lowrank
from megastruct.structures.lowrank.layers import LowRankLinear

sizes = st.integers(1, 9)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(n=sizes, m=sizes, r=sizes, batch=st.lists(sizes, max_size=2), bias=st.booleans(), seed=st.integers(0, 99))
def test_output_and_gradients(n: int, m: int, r: int, batch: list[int], bias: bool, seed: int) -> None:
    arguments = [draw(*batch, n, seed=seed), draw(r, n, seed=seed + 1), draw(m, r, seed=seed + 2)]
    arguments += [draw(m, seed=seed + 3)] if bias else []
    weight = draw(*batch, m, seed=seed + 4)
    results = []
    for function in (lowrank.apply, lowrank.apply_reference):
        inputs = [argument.clone().requires_grad_() for argument in arguments]
        y = function(*inputs)
        (y * weight).sum().backward()
        results.append([y.detach(), *(x.grad for x in inputs)])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-10)
    identity = torch.eye(n, dtype=torch.float64)
    dense = lowrank.to_dense(arguments[1], arguments[2])
    torch.testing.assert_close(lowrank.apply(identity, arguments[1], arguments[2]).T, dense)


def test_non_contiguous_input() -> None:
    x, v, u = draw(5, 7, 3, seed=0).transpose(0, 1), draw(2, 3, seed=1), draw(4, 2, seed=2)
    torch.testing.assert_close(lowrank.apply(x, v, u), lowrank.apply_reference(x, v, u))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 40), m=st.integers(2, 40), share=st.floats(0.1, 1.0), seed=st.integers(0, 99))
def test_init_is_the_truncated_svd(n: int, m: int, share: float, seed: int) -> None:
    weight = draw(m, n, seed=seed)
    rank = max(1, int(share * min(n, m)))
    v, u = lowrank.init_factors(weight, rank)
    left, singular, right = np.linalg.svd(weight.numpy(), full_matrices=False)
    best = (left[:, :rank] * singular[:rank]) @ right[:rank]
    # The Gram matrix squares the condition: 1e-6 of the largest value is what float64 leaves of the smallest.
    np.testing.assert_allclose((u @ v).numpy(), best, atol=1e-6 * singular[0])
    # sqrt(S) on either side: both factors carry the same scale, direction by direction
    np.testing.assert_allclose((u * u).sum(0).numpy(), singular[:rank], rtol=1e-4, atol=1e-6 * singular[0])
    np.testing.assert_allclose((v * v).sum(1).numpy(), singular[:rank], rtol=1e-4, atol=1e-6 * singular[0])


def test_layer_init_depends_on_its_name() -> None:
    first, again, other = (LowRankLinear(12, 20, 5) for _ in range(3))
    first.init_weights((1, "a"))
    again.init_weights((1, "a"))
    other.init_weights((1, "b"))
    assert torch.equal(first.u, again.u) and torch.equal(first.v, again.v)
    assert not torch.equal(first.u, other.u)
    assert torch.equal(first.bias, torch.zeros(20))
