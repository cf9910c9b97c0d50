"""Products with block-diagonal matrices, in layouts that cost no copy.

Shapes: w [B, o, i] maps x [..., B i] to [..., B o]: block l reads the features from l i on and writes those from l o
on; if shuffled, it reads the features r B + l and writes s B + l. A tensor [..., F] of T tokens is either token-major
(contiguous) or feature-major (in memory a contiguous [F, T]). cuBLAS reads and writes one matrix per block with any
distance between rows, so the blocks of both layouts, and the shuffle in the feature-major one, are only strides.

The products are custom operators for two reasons: they write straight into their destination, which autograd cannot
express, and the compiler keeps the layouts that custom operators ask for. They take x with all its dimensions: if x
went through a view, the compiler would lay out a neighbouring element-wise operator token-major and copy its result.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def is_feature_major(x: Tensor) -> bool:
    """Whether x [..., F] is laid out in memory as a contiguous [F, T]."""
    return not x.is_contiguous() and x.movedim(-1, 0).is_contiguous()


def _by_block(x: Tensor, nblocks: int, shuffled: bool) -> Tensor:
    """[..., F] -> [B, T, F/B]; a view in both layouts."""
    x = x.reshape(-1, x.shape[-1])
    if shuffled:
        return x.unflatten(1, (-1, nblocks)).permute(2, 0, 1)
    return x.unflatten(1, (nblocks, -1)).transpose(0, 1)


def _goes_wide(x: Tensor) -> bool:
    """Whether operands are multiplied in fp32 and the result is rounded: CPUs have no fast bf16 kernel for strides."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def _empty(x: Tensor, features: int, feature_major: bool) -> Tensor:
    leading = x.shape[:-1]
    return x.new_empty(features, *leading).movedim(0, -1) if feature_major else x.new_empty(*leading, features)


@torch.library.custom_op("megastruct::block_product", mutates_args=())
def block_product(x: Tensor, w: Tensor, shuffled: bool, feature_major: bool) -> Tensor:
    """Multiply x [..., B i] by w [B, o, i] to [..., B o], in the layout that is asked for.

    If `shuffled`, x must be feature-major, and so must the layout of the result.
    """
    if _goes_wide(x):
        return block_product(x.float(), w.float(), shuffled, feature_major).to(x.dtype)
    nblocks, out_per_block, _ = w.shape
    y = _empty(x, nblocks * out_per_block, feature_major)
    torch.bmm(_by_block(x, nblocks, shuffled), w.mT, out=_by_block(y, nblocks, shuffled))
    return y


@block_product.register_fake
def _(x: Tensor, w: Tensor, shuffled: bool, feature_major: bool) -> Tensor:
    return _empty(x, w.shape[0] * w.shape[1], feature_major)


@torch.library.custom_op("megastruct::block_product_weight_gradient", mutates_args=())
def block_product_weight_gradient(gradient: Tensor, x: Tensor, nblocks: int, shuffled: bool) -> Tensor:
    """Gradient [..., B o] of the product and its input x [..., B i] -> gradient of w [B, o, i]."""
    if _goes_wide(x):
        return block_product_weight_gradient(gradient.float(), x.float(), nblocks, shuffled).to(x.dtype)
    return torch.bmm(_by_block(gradient, nblocks, shuffled).mT, _by_block(x, nblocks, shuffled))


@block_product_weight_gradient.register_fake
def _(gradient: Tensor, x: Tensor, nblocks: int, shuffled: bool) -> Tensor:
    return x.new_empty(nblocks, gradient.shape[-1] // nblocks, x.shape[-1] // nblocks)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool, bool], output: Tensor) -> None:
    x, w, ctx.shuffled, ctx.feature_major = inputs
    ctx.save_for_backward(x, w)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    """The gradient of x gets the layout of x.

    The incoming gradient is copied if it is in neither layout, or if it is token-major and the product is shuffled, as
    it is when it comes from a residual stream.
    """
    x, w = ctx.saved_tensors
    if ctx.shuffled or not gradient.is_contiguous():
        gradient = gradient.movedim(-1, 0).contiguous().movedim(0, -1)
    by_x = by_w = None
    if ctx.needs_input_grad[0]:
        by_x = block_product(gradient, w.mT, ctx.shuffled, ctx.shuffled or is_feature_major(x))
    if ctx.needs_input_grad[1]:
        by_w = block_product_weight_gradient(gradient, x, w.shape[0], ctx.shuffled)
    return by_x, by_w, None, None


block_product.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula([torch.ops.megastruct.block_product])
def _product_flops(x_shape: tuple[int, ...], w_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x_shape[:-1]) * math.prod(w_shape)


@register_flop_formula([torch.ops.megastruct.block_product_weight_gradient])
def _gradient_flops(gradient_shape: tuple[int, ...], x_shape: tuple[int, ...], nblocks: int, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x_shape) * gradient_shape[-1] // nblocks
