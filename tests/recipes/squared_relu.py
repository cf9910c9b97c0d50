"""A model variant: the squared ReLU as another activation. Source: So et al. 2021 (arXiv 2109.08668)."""

from __future__ import annotations

from torch import Tensor

from megastruct.config.activations import Activation

SQUARED_RELU = Activation("relu2", "squared_relu:relu2")


def relu2(y: Tensor) -> Tensor:
    """[..., f] -> [..., f]: the positive part, squared."""
    return y.relu().square()
