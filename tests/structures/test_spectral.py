"""The structure-aware start: every factor has the spectral norm that its own d_in and d_out ask for."""

from __future__ import annotations

import math

import pytest
import torch

from megastruct.structures.blockdense.layers import BlockDenseLinear
from megastruct.structures.blockshuffle.layers import BlockShuffleLinear
from megastruct.structures.dense.layers import Linear
from megastruct.structures.lowrank.layers import LowRankLinear
from megastruct.structures.spectral import spectral_std


@pytest.mark.parametrize(("n", "m"), [(48, 96), (96, 48)])
@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (LowRankLinear, {"rank": 12}),
        (BlockDenseLinear, {"rank": 12, "nblocks": 4}),
        (BlockShuffleLinear, {"nblocks": 4}),
    ],
    ids=["lowrank", "blockdense", "blockshuffle"],
)
def test_factors(layer: type, sizes: dict[str, int], n: int, m: int) -> None:
    built = layer(n, m, **sizes, init_std=None)
    built.init_weights((1, "a"))
    for factor in (built.v.detach(), built.u.detach()):
        d_out, d_in = factor.shape[-2:]
        singular = torch.linalg.svdvals(factor.double())
        torch.testing.assert_close(singular, torch.full_like(singular, math.sqrt(d_out / d_in)), rtol=1e-6, atol=0)
        # Entries of that orthonormal matrix are as large as the Gaussian ones that have the norm up to a constant.
        assert float(factor.square().mean().sqrt()) == pytest.approx(spectral_std(factor), rel=1e-6)


@pytest.mark.parametrize(("n", "m", "std"), [(256, 1024, 1 / 16), (1024, 256, 1 / 64)])
def test_dense(n: int, m: int, std: float) -> None:
    built = Linear(n, m, init_std=None)
    built.init_weights((1, "a"))
    assert float(built.weight.std()) == pytest.approx(std, rel=0.01)


def test_the_same_draws_as_the_plain_start() -> None:
    """Dense weights differ by a number, LowRank's factors by one for every direction."""
    dense, aware = Linear(12, 20, init_std=0.02), Linear(12, 20, init_std=None)
    plain, scaled = LowRankLinear(12, 20, 5), LowRankLinear(12, 20, 5, init_std=None)
    for layer in (dense, aware, plain, scaled):
        layer.init_weights((1, "a"))
    torch.testing.assert_close(aware.weight / spectral_std(aware.weight), dense.weight / 0.02)
    cosine = torch.nn.functional.cosine_similarity(plain.v, scaled.v, dim=1)
    torch.testing.assert_close(cosine, torch.ones(5), rtol=0, atol=1e-5)
