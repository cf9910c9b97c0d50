"""LowRank: output and every gradient against the sums written out; its initialisation against draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megastruct.structures.draws import singular_values_of_a_draw
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
def test_init_is_a_singular_value_decomposition(n: int, m: int, share: float, seed: int) -> None:
    """With the singular values of a draw, shared evenly by both factors, direction by direction."""
    rank = max(1, int(share * min(n, m)))
    v, u = lowrank.init_factors(draw(rank, n, seed=seed), draw(m, rank, seed=seed + 1), std=0.5)
    expected = 0.5 * singular_values_of_a_draw(m, n, rank)
    np.testing.assert_allclose(np.linalg.svd((u @ v).numpy())[1][:rank], expected, rtol=1e-9)
    for gram in (u.T @ u, v @ v.T):
        np.testing.assert_allclose(gram.numpy(), np.diag(expected), atol=1e-9 * expected[0])


@pytest.mark.parametrize(("m", "n"), [(64, 16), (16, 64), (96, 96), (300, 200)])
def test_init_has_the_singular_values_of_draws(m: int, n: int) -> None:
    """They lie within what draws scatter, and their squares sum up to the mean of a draw's."""
    values = singular_values_of_a_draw(m, n, min(m, n))
    draws = np.random.default_rng(0).standard_normal((100, m, n))
    found = np.linalg.svd(draws, compute_uv=False)
    assert (abs(values - found.mean(0)) < 2 * found.std(0)).all()
    np.testing.assert_allclose((values**2).sum(), m * n, rtol=1e-9)
    np.testing.assert_array_equal(singular_values_of_a_draw(m, n, 5), values[:5])


def test_first_directions_are_uniformly_distributed() -> None:
    """The second moments of all entries of both factors, over many layers."""
    squares = [np.zeros((3, 12)), np.zeros((20, 3))]
    for index in range(2000):
        factors = lowrank.init_factors(draw(3, 12, seed=index), draw(20, 3, seed=10_000 + index), std=1.0)
        for total, factor in zip(squares, factors, strict=True):
            total += factor.numpy() ** 2 / 2000
    values = singular_values_of_a_draw(20, 12, 3)
    np.testing.assert_allclose(squares[0], (values / 12)[:, None] * np.ones((3, 12)), rtol=0.15)
    np.testing.assert_allclose(squares[1], values / 20 * np.ones((20, 3)), rtol=0.15)


def test_layer_init_depends_on_its_name() -> None:
    first, again, other = (LowRankLinear(12, 20, 5) for _ in range(3))
    first.init_weights((1, "a"))
    again.init_weights((1, "a"))
    other.init_weights((1, "b"))
    assert torch.equal(first.u, again.u) and torch.equal(first.v, again.v)
    assert not torch.equal(first.u, other.u)
    assert torch.equal(first.bias, torch.zeros(20))
