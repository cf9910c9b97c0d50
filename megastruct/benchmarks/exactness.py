"""How far a feed-forward layer is from exact arithmetic: its output and every gradient against float64.

The reference knows no structure: it multiplies by the equal dense matrices (`to_dense` of the same weights), and takes
the gradients of those matrices back to the factors through `to_dense`.

Letters: s sequence, b batch, N inputs and M outputs of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megastruct.models.mlp import MLP
from megastruct.structures.sharded import ShardedLinear

# The largest error that counts as rounding, by dtype. A result is rounded to 8 bits in bf16 and to 24 in fp32, and so
# are the two to six products and sums before it; a product of fp32 has sums of up to 10^5 rounded terms.
BOUNDS = {torch.bfloat16: 0.02, torch.float32: 1e-4}
CHUNK_TOKENS = 2048  # whose float64 values are in memory at a time

OUTPUT, INPUT = "output", "gradient of the input"


class Step(NamedTuple):
    """One forward and backward: the output [s, b, M], and the gradients of the input [s, b, N] and of every weight.

    A gradient is None if the output does not depend on it.
    """

    output: Tensor
    by_input: Tensor | None
    by_parameter: dict[str, Tensor | None]


def forward_and_backward(module: nn.Module, x: Tensor, gradient: Tensor) -> Step:
    """Map x [s, b, N], which requires a gradient, and take the output's gradient [s, b, M] back."""
    parameters = dict(module.named_parameters())
    y = module(x)
    by_x, *by_parameter = torch.autograd.grad(y, [x, *parameters.values()], gradient, allow_unused=True)
    return Step(y, by_x, dict(zip(parameters, by_parameter, strict=True)))


def relative_errors(module: nn.Module, x: Tensor, gradient: Tensor) -> dict[str, float]:
    """|result - reference| / |reference|, in the Frobenius norm, of the output and of every gradient, by name.

    `module`: an MLP without guides or a linear, on one process. x [s, b, N] and gradient [s, b, M] are in its dtype.
    """
    found = forward_and_backward(module, x, gradient)
    exact = {name: parameter.detach().double().requires_grad_() for name, parameter in module.named_parameters()}
    apply, close = _dense_map(module, exact)
    sums = {OUTPUT: _Sums(), INPUT: _Sums()}
    for rows in _chunks(x):
        inputs = x.detach()[rows].double().requires_grad_()
        y = apply(inputs)
        y.backward(gradient[rows].double())
        assert inputs.grad is not None
        sums[OUTPUT].add(found.output.detach()[rows], y.detach())
        sums[INPUT].add(None if found.by_input is None else found.by_input[rows], inputs.grad)
    close()
    for name, parameter in exact.items():
        assert parameter.grad is not None
        sums[f"gradient of {name}"] = _Sums()
        sums[f"gradient of {name}"].add(found.by_parameter[name], parameter.grad)
    return {name: total.relative_error() for name, total in sums.items()}


def _dense_map(module: nn.Module, exact: dict[str, Tensor]) -> tuple[Callable[[Tensor], Tensor], Callable[[], None]]:
    """The map as products with dense matrices, and what takes their gradients back to the factors in the end.

    `exact`: the parameters by name, which gather their gradients.
    """
    linears = [("fc1.", module.fc1), ("fc2.", module.fc2)] if isinstance(module, MLP) else [("", module)]
    merged: list[tuple[Tensor, Tensor]] = []  # through `to_dense`, and cut off from it
    biases: list[Tensor | None] = []
    for prefix, linear in linears:
        assert isinstance(linear, ShardedLinear)
        weight = linear.linear.maths.to_dense(*(exact[prefix + name] for name in linear.factor_names))
        merged.append((weight, weight.detach().requires_grad_()))
        biases.append(exact.get(f"{prefix}bias"))

    def apply(x: Tensor) -> Tensor:
        y = F.linear(x, merged[0][1], biases[0])
        return F.linear(module.activation(y), merged[1][1], biases[1]) if isinstance(module, MLP) else y

    def close() -> None:
        for weight, alone in merged:
            weight.backward(alone.grad)

    return apply, close


def _chunks(x: Tensor) -> Iterator[slice]:
    length, batch = x.shape[:2]
    size = max(1, CHUNK_TOKENS // batch)
    return (slice(start, start + size) for start in range(0, length, size))


class _Sums:
    """Sums of squares of the differences and of the reference."""

    def __init__(self) -> None:
        self.difference = self.reference = 0.0

    def add(self, found: Tensor | None, reference: Tensor) -> None:
        difference = reference if found is None else found.double() - reference
        self.difference += float(difference.square().sum())
        self.reference += float(reference.square().sum())

    def relative_error(self) -> float:
        if not self.reference:
            return 0.0 if self.difference == 0.0 else math.inf
        return (self.difference / self.reference) ** 0.5
