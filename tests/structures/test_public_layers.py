"""Layers as a user makes them: `megastruct.LowRankLinear(768, 3072, rank=128)` in any module."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import megastruct
from configs import tiny_config
from megastruct.parallel.groups import ALONE
from megastruct.structures import STRUCTURES
from megastruct.structures.linear import StructuredLinear, empty_weights
from megastruct.structures.lowrank.layers import LowRankColumnLinear

LAYERS: dict[str, tuple[type[StructuredLinear], dict[str, int]]] = {
    "dense": (megastruct.Linear, {}),
    "lowrank": (megastruct.LowRankLinear, {"rank": 16}),
    "blockdense": (megastruct.BlockDenseLinear, {"rank": 16, "nblocks": 2}),
    "blockshuffle": (megastruct.BlockShuffleLinear, {"nblocks": 4}),
}


def test_every_structure_has_its_layer() -> None:
    assert {name: layer for name, (layer, _) in LAYERS.items()} == {
        name: structure.layers.linear for name, structure in STRUCTURES.items() if name in LAYERS
    }
    assert set(megastruct.__all__) <= set(dir(megastruct))
    with pytest.raises(AttributeError, match="LowRank"):
        megastruct.LowRank  # noqa: B018


@pytest.mark.parametrize("structure", LAYERS)
def test_a_layer_is_initialised(structure: str) -> None:
    layer_class, sizes = LAYERS[structure]
    torch.manual_seed(5)
    first, second = (layer_class(32, 64, **sizes) for _ in range(2))
    torch.manual_seed(5)
    again = layer_class(32, 64, **sizes)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        assert name == "bias" or not torch.equal(parameter, second.get_parameter(name))
    assert first.bias is not None and not first.bias.any()
    # As in training: the layer with the same seed there has the same weights.
    with empty_weights():
        trained = layer_class(32, 64, **sizes)
    torch.manual_seed(5)
    trained.init_weights((int(torch.randint(2**62, ())), "weights"))
    assert torch.equal(trained.to_dense(), first.to_dense())


@pytest.mark.parametrize("structure", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_in_a_module(structure: str, bias: bool) -> None:
    """It trains, is copied by its state, is cast, and merges to a Linear that maps alike."""
    layer_class, sizes = LAYERS[structure]
    module = nn.Sequential(layer_class(32, 64, bias=bias, **sizes), nn.GELU(), layer_class(64, 32, bias=bias, **sizes))
    module = module.double()
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    module(x).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in module.parameters())
    copy = nn.Sequential(layer_class(32, 64, bias=bias, **sizes), nn.GELU(), layer_class(64, 32, bias=bias, **sizes))
    copy.double().load_state_dict(module.state_dict())
    assert torch.equal(copy(x), module(x))
    merged = nn.Sequential(copy[0].merge(), nn.GELU(), copy[2].merge())  # type: ignore[operator]
    assert type(merged[0]) is nn.Linear and merged[0].weight.dtype == torch.float64
    torch.testing.assert_close(merged(x), module(x), rtol=1e-12, atol=1e-12)


def test_repr_shows_the_sizes() -> None:
    assert repr(megastruct.BlockDenseLinear(32, 64, nblocks=2, rank=16)) == (
        "BlockDenseLinear(32, 64, nblocks=2, rank=16, bias=True)"
    )


@pytest.mark.parametrize(
    ("layer_class", "sizes", "wanted"),
    [
        (megastruct.LowRankLinear, {"rank": 0}, "rank"),
        (megastruct.LowRankLinear, {"rank": 33}, "32"),
        (megastruct.BlockDenseLinear, {"rank": 15, "nblocks": 2}, "rank=14"),
        (megastruct.BlockShuffleLinear, {"nblocks": 5}, "4"),
    ],
)
def test_impossible_sizes(layer_class: Any, sizes: dict[str, int], wanted: str) -> None:
    """The message has the nearest sizes that work."""
    with pytest.raises(megastruct.SizeError, match=wanted) as caught:
        layer_class(32, 64, **sizes)
    assert isinstance(caught.value, megastruct.MegastructError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize("wrong", [8.0, "8", True])
def test_a_size_that_is_no_whole_number(wrong: Any) -> None:
    for make in (
        lambda: megastruct.LowRankLinear(32, 64, rank=wrong),
        lambda: megastruct.BlockDenseLinear(32, 64, nblocks=wrong, rank=8),
    ):
        with pytest.raises(megastruct.SizeError, match="whole numbers"):
            make()


@pytest.mark.parametrize("wrong", [0, -8, 8.0, "8", None])
def test_impossible_widths(wrong: Any) -> None:
    for make in (
        lambda: megastruct.Linear(wrong, 64),
        lambda: megastruct.Linear(32, wrong),
        lambda: megastruct.LowRankLinear(wrong, 64, rank=8),
        lambda: megastruct.BlockShuffleLinear(32, wrong, nblocks=2),
    ):
        with pytest.raises(megastruct.SizeError, match="of at least 1"):
            make()


def test_a_size_of_another_structure_is_refused() -> None:
    with pytest.raises(megastruct.SizeError, match="lowrank has no nblocks; its sizes: rank"):
        LowRankColumnLinear(32, 64, tp=ALONE, rank=8, nblocks=2)


def test_a_layer_is_made_on_the_device_that_is_asked_for() -> None:
    with torch.device("meta"):
        assert megastruct.LowRankLinear(32, 64, rank=8).v.is_meta


def test_a_model_is_initialised() -> None:
    config = tiny_config()
    assert all(
        torch.equal(a, b)
        for a, b in zip(megastruct.GPT(config).parameters(), megastruct.GPT(config).parameters(), strict=True)
    )
    assert isinstance(config, megastruct.Config)


def test_importing_the_package_loads_no_torch() -> None:
    program = "import sys, megastruct; assert 'torch' not in sys.modules; megastruct.UserError; print('ok')"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "ok\n"
