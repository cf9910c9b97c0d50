"""The feed-forward layers that the benchmark `kernels` measures: their sizes, their FLOPs, and the modules themselves.

Letters: d hidden size, f inner width of the feed-forward network, N inputs and M outputs of a linear map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn

from megastruct.config.activations import Activation
from megastruct.models.mlp import MLP
from megastruct.parallel.groups import ALONE
from megastruct.structures import DENSE, STRUCTURES
from megastruct.structures.numbers import LinearMap, Sizes, Widths, share_of_dense
from megastruct.structures.sharded import LinearBuilder

Part = Literal["ffn", "fc1", "fc2"]


@dataclass(frozen=True)
class FFN:
    """A feed-forward network d -> f -> d of one structure, or one of its two linears (`part`), on one process.

    `wanted_share`: the share of the dense weights for which `sizes` were chosen; None if they were given.
    """

    structure: str
    hidden_size: int
    ffn_hidden_size: int
    activation: Activation
    bias: bool = True
    part: Part = "ffn"
    sizes: Sizes = field(default_factory=dict)
    wanted_share: float | None = None

    @property
    def is_dense(self) -> bool:
        """Whether this is the layer that the others are compared with."""
        return self.structure == DENSE

    @property
    def name(self) -> str:
        """The structure and its sizes."""
        return " ".join([self.structure, *(f"{key}={value}" for key, value in self.sizes.items())])

    @property
    def maps(self) -> tuple[LinearMap, ...]:
        """The linear maps of the part that is measured."""
        both = self._both_maps()
        return both if self.part == "ffn" else (both[0 if self.part == "fc1" else 1],)

    @property
    def in_features(self) -> int:
        """Inputs of the part that is measured."""
        return self.maps[0].n

    @property
    def out_features(self) -> int:
        """Outputs of the part that is measured."""
        return self.maps[-1].m

    @property
    def weights(self) -> int:
        """Entries of all factors, without biases."""
        return sum(linear.weights for linear in self.maps)

    @property
    def share(self) -> float:
        """The weights as a share of the dense layer's."""
        return share_of_dense(self.maps)

    @property
    def forward_flops(self) -> int:
        """FLOPs per token of the forward, of matrix products only: two per multiply-add. The backward has twice as
        many."""
        return 2 * sum(linear.multiply_adds for linear in self.maps)

    def dense(self) -> FFN:
        """The dense layer of the same widths."""
        return replace(self, structure=DENSE, sizes={}, wanted_share=None)

    def with_share(self, structure: str, share: float) -> FFN:
        """The layer of a structure whose sizes give the whole network about `share` of the dense weights.

        The sizes are those that `tools/plan.py --ffn-share` suggests.
        """

        def share_of(sizes: Sizes) -> float:
            return share_of_dense(replace(self, structure=structure, sizes=sizes)._both_maps())

        widths = Widths(self.hidden_size, self.ffn_hidden_size)
        sizes = STRUCTURES[structure].numbers.nearest_sizes(widths, share, share_of, {})
        return replace(self, structure=structure, sizes=sizes, wanted_share=share)

    def build(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The module, with random weights that keep activations and gradients near a variance of 1."""
        layers = STRUCTURES[self.structure].layers
        builders = (partial(form, tp=ALONE, bias=self.bias, **self.sizes) for form in (layers.column, layers.row))
        fc1, fc2 = cast(tuple[LinearBuilder, LinearBuilder], tuple(builders))
        first, second = self._both_maps()
        module: nn.Module
        with torch.device(device):
            if self.part == "fc1":
                module = fc1(first.n, first.m)
            elif self.part == "fc2":
                module = fc2(second.n, second.m)
            else:
                module = MLP(self.hidden_size, self.ffn_hidden_size, self.activation, fc1, fc2)
        generator = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for parameter in module.to(dtype).parameters():
                std = 1.0 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
                parameter.normal_(0.0, std, generator=generator)
        return module

    def _both_maps(self) -> tuple[LinearMap, LinearMap]:
        structure, d, f = STRUCTURES[self.structure], self.hidden_size, self.ffn_hidden_size
        first = structure.linear_map("column", d, f * self.activation.fc1_width, self.sizes)
        return first, structure.linear_map("row", f, d, self.sizes)

    def as_json(self) -> dict[str, Any]:
        """What identifies the layer, as plain values."""
        return {
            "structure": self.structure,
            "sizes": dict(self.sizes),
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "weights": self.weights,
            "wanted_share": self.wanted_share,
            "share": self.share,
        }


class Variant(NamedTuple):
    """A structure that is to be measured. Without `sizes`, shares of the dense weights decide on them."""

    structure: str
    sizes: tuple[tuple[str, int], ...] = ()


def layers_to_compare(dense: FFN, variants: Sequence[Variant], shares: Sequence[float]) -> Iterator[FFN]:
    """`dense` first, then the variants, those without sizes at every share. Equal layers are one."""
    yield dense
    seen = [dense.name]
    for structure, sizes in variants:
        if sizes:
            layers = [replace(dense, structure=structure, sizes=dict(sizes))]
        else:
            layers = [dense.with_share(structure, share) for share in shares]
        for layer in layers:
            if layer.name not in seen:
                seen.append(layer.name)
                yield layer
