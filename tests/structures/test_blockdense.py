"""BlockDense: output and every gradient against the sums written out; its start; its layer."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from factors import (
    check_against_reference,
    check_bfloat16_and_autocast,
    check_compiled,
    check_non_contiguous,
    check_orthonormal,
    draw,
)
from megastruct.structures.blockdense import maths as blockdense
from megastruct.structures.blockdense.layers import BlockDenseLinear
from megastruct.structures.orthonormal import orthonormalized

sizes = st.integers(1, 4)


def factors(nblocks: int, n: int, r: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """v [B, r, n], u [m, B*r]: n and r are sizes per block."""
    return draw(nblocks, r, n, seed=seed + 1), draw(m, nblocks * r, seed=seed + 2)


@settings(max_examples=40, deadline=None)
@given(
    nblocks=sizes,
    n=sizes,
    r=sizes,
    m=st.integers(1, 9),
    batch=st.lists(sizes, max_size=2),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_output_and_gradients(nblocks: int, n: int, r: int, m: int, batch: list[int], bias: bool, seed: int) -> None:
    arguments = [draw(*batch, nblocks * n, seed=seed), *factors(nblocks, n, r, m, seed)]
    arguments += [draw(m, seed=seed + 3)] if bias else []
    check_against_reference(blockdense, arguments, seed + 4)


def test_layouts_and_dtypes() -> None:
    v, u = factors(2, 6, 4, 10)
    check_non_contiguous(blockdense, draw(3, 5, 12, seed=0), v, u)
    check_bfloat16_and_autocast(blockdense, [draw(3, 5, 12, seed=0), v, u, draw(10, seed=3)])


def test_compiles_to_one_graph() -> None:
    check_compiled(blockdense, [draw(3, 5, 12, seed=0), *factors(2, 6, 4, 10), draw(10, seed=3)])


def test_layer_starts_with_the_nearest_orthonormal_blocks() -> None:
    layer, again, other = (BlockDenseLinear(16, 20, nblocks=4, rank=8) for _ in range(3))
    layer.init_weights((1, "a"))
    again.init_weights((1, "a"))
    other.init_weights((1, "b"))
    assert layer.v.shape == (4, 2, 4) and layer.u.shape == (20, 8)
    check_orthonormal(layer.v)
    check_orthonormal(layer.u)
    assert torch.equal(layer.v, again.v) and torch.equal(layer.u, again.u)
    assert not torch.equal(layer.v, other.v) and not torch.equal(layer.u, other.u)
    assert torch.equal(layer.bias, torch.zeros(20))
    x = draw(3, 16, seed=0, dtype=torch.float32)
    torch.testing.assert_close(layer(x), x @ layer.to_dense().T)


def test_init_is_the_orthonormal_factor_of_each_block() -> None:
    v, u = factors(3, 5, 4, 14, seed=9)
    new_v, new_u = blockdense.init_factors(v, u, std=1.0)
    for weight, new in [(u, new_u), *zip(v, new_v, strict=True)]:
        torch.testing.assert_close(new, orthonormalized(weight))
