"""A kernel: both products of LowRank as one operator with a backward of its own, under a structure of its own.

The operator below calls two matrix products. A Triton or CUDA kernel takes their place and keeps everything else.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megastruct.structures import Structure
from megastruct.structures.layers import Layers
from megastruct.structures.lowrank import maths as plain
from megastruct.structures.lowrank.layers import LowRankColumnLinear, LowRankLinear, LowRankRowLinear
from megastruct.structures.lowrank.numbers import LowRankNumbers


@torch.library.custom_op("recipes::lowrank", mutates_args=())
def product(x: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, N], v [R, N], u [M, R] -> y [T, M] and the inner vector [T, R], which the backward needs."""
    y, hidden = x.new_empty(x.shape[0], u.shape[0]), x.new_empty(x.shape[0], v.shape[0])
    torch.mm(x, v.mT, out=hidden)
    torch.mm(hidden, u.mT, out=y)
    return y, hidden


@product.register_fake
def _(x: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], u.shape[0]), x.new_empty(x.shape[0], v.shape[0])


@torch.library.custom_op("recipes::lowrank_backward", mutates_args=())
def product_backward(g: Tensor, x: Tensor, v: Tensor, u: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient g [T, M] of y -> the gradients of x, v and u."""
    by_hidden = g @ u
    return by_hidden @ v, by_hidden.mT @ x, g.mT @ hidden


@product_backward.register_fake
def _(g: Tensor, x: Tensor, v: Tensor, u: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(v), torch.empty_like(u)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return product_backward(g.contiguous(), *ctx.saved_tensors)


product.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula([torch.ops.recipes.lowrank])
def _flops(x: tuple[int, ...], v: tuple[int, ...], u: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * x[0] * (math.prod(v) + math.prod(u))


@register_flop_formula([torch.ops.recipes.lowrank_backward])
def _backward_flops(
    g: tuple[int, ...], x: tuple[int, ...], v: tuple[int, ...], u: tuple[int, ...], *_: Any, **__: Any
) -> int:
    return 2 * 2 * x[0] * (math.prod(v) + math.prod(u))


def apply(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None) -> Tensor:
    """As LowRank's `apply`. What the kernel does not take, the plain form does."""
    if x.numel() == 0 or not x.dtype == v.dtype == u.dtype:
        return plain.apply(x, v, u, bias)
    y, _ = product(x.reshape(-1, x.shape[-1]), v, u)
    y = y.unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


apply_reference, to_dense, init_factors = plain.apply_reference, plain.to_dense, plain.init_factors


class FusedNumbers(LowRankNumbers):
    """LowRank's, under another name."""

    name = "fused_lowrank"


class FusedLinear(LowRankLinear):
    """LowRank's layer of one process with this module's mathematics."""

    numbers, maths = FusedNumbers(), sys.modules[__name__]


class FusedColumnLinear(LowRankColumnLinear):
    """On one rank `linear.maths.apply` is what trains."""

    linear = FusedLinear


class FusedRowLinear(LowRankRowLinear):
    """As the column form."""

    linear = FusedLinear


LAYERS = Layers(sys.modules[__name__], FusedLinear, FusedColumnLinear, FusedRowLinear)
STRUCTURE = Structure(FusedNumbers(), "fused_lowrank")
