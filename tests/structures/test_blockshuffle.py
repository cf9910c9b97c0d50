"""BlockShuffle: output and every gradient against the sums and shuffles written out; its start; its layer."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from factors import (
    check_against_reference,
    check_bfloat16_and_autocast,
    check_compiled,
    check_non_contiguous,
    check_orthonormal,
    draw,
)
from megastruct.structures import STRUCTURES
from megastruct.structures.block_product import is_feature_major
from megastruct.structures.blockshuffle import maths as blockshuffle
from megastruct.structures.blockshuffle.layers import BlockShuffleLinear
from megastruct.structures.orthonormal import orthonormalized

sizes = st.integers(1, 4)


def factors(nblocks: int, n: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """v [B, k, n], u [B, m, k], k = min(n, m): sizes per block."""
    return draw(nblocks, min(n, m), n, seed=seed + 1), draw(nblocks, m, min(n, m), seed=seed + 2)


@settings(max_examples=40, deadline=None)
@given(nblocks=sizes, n=sizes, m=sizes, batch=st.lists(sizes, max_size=2), bias=st.booleans(), seed=st.integers(0, 99))
def test_output_and_gradients(nblocks: int, n: int, m: int, batch: list[int], bias: bool, seed: int) -> None:
    arguments = [draw(*batch, nblocks * n, seed=seed), *factors(nblocks, n, m, seed)]
    arguments += [draw(nblocks * m, seed=seed + 3)] if bias else []
    check_against_reference(blockshuffle, arguments, seed + 4)


def test_two_blocks_by_hand() -> None:
    """Blocks of ones: block l of the second factor sees hidden features l and 2 + l, one of either first block."""
    v = torch.ones(2, 2, 2) * torch.tensor([1.0, 10.0])[:, None, None]
    u = torch.eye(2).expand(2, 2, 2)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert blockshuffle.apply(x, v, u).tolist() == [3.0, 3.0, 70.0, 70.0]  # f^-1(f(V x)) = V x
    u = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])
    assert blockshuffle.apply(x, v, u).tolist() == [3.0, 0.0, 0.0, 70.0]


def test_layouts_and_dtypes() -> None:
    v, u = factors(3, 4, 6)
    check_non_contiguous(blockshuffle, draw(3, 5, 12, seed=0), v, u)
    check_bfloat16_and_autocast(blockshuffle, [draw(3, 5, 12, seed=0), v, u, draw(18, seed=3)])


def test_nothing_is_laid_out_anew_between_two_maps() -> None:
    """Output and what an activation makes of it are feature-major; the gradient of a contiguous x is contiguous."""
    v, u = factors(3, 4, 6)
    x = draw(3, 5, 12, seed=0).requires_grad_()
    y = blockshuffle.apply(x, v, u, draw(18, seed=3))
    assert is_feature_major(y) and is_feature_major(torch.nn.functional.gelu(y))
    y.sum().backward()
    assert x.grad is not None and x.grad.is_contiguous()


def test_compiles_to_one_graph() -> None:
    check_compiled(blockshuffle, [draw(3, 5, 12, seed=0), *factors(3, 4, 6), draw(18, seed=3)])


def test_flops_are_counted() -> None:
    x, (v, u) = draw(7, 12, seed=0), factors(3, 4, 6)
    with FlopCounterMode(display=False) as counter:
        blockshuffle.apply(x.requires_grad_(), v.requires_grad_(), u.requires_grad_()).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 7 * STRUCTURES["blockshuffle"].numbers.weights(12, 18, {"nblocks": 3})


def test_layer_starts_with_the_nearest_orthonormal_blocks() -> None:
    layer, again, other = (BlockShuffleLinear(16, 24, nblocks=4) for _ in range(3))
    layer.init_weights((1, "a"))
    again.init_weights((1, "a"))
    other.init_weights((1, "b"))
    assert layer.v.shape == (4, 4, 4) and layer.u.shape == (4, 6, 4)
    check_orthonormal(layer.v)
    check_orthonormal(layer.u)
    assert torch.equal(layer.v, again.v) and torch.equal(layer.u, again.u)
    assert not torch.equal(layer.v, other.v) and not torch.equal(layer.u, other.u)
    assert torch.equal(layer.bias, torch.zeros(24))
    x = draw(3, 16, seed=0, dtype=torch.float32)
    torch.testing.assert_close(layer(x), x @ layer.to_dense().T)


def test_init_is_the_orthonormal_factor_of_each_block() -> None:
    v, u = factors(3, 5, 4, seed=9)
    for weights, news in zip((v, u), blockshuffle.init_factors(v, u, std=1.0), strict=True):
        for weight, new in zip(weights, news, strict=True):
            torch.testing.assert_close(new, orthonormalized(weight))
