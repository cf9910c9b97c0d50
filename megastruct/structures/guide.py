"""The dense guide W of a structured linear S: o = alpha W x + (1 - alpha) S x + b, on all tokens or on chosen ones.

The guide is a dense column- or row-parallel linear without a bias of its own (the structured linear's serves both). It
starts as the exact dense equivalent, so at first the output does not depend on alpha. The host decides which tokens the
guide sees and passes them in as tensors, so that one compiled block serves every choice. Source: arXiv 2406.16450,
section 3; the choice of rows is our own.

Letters: s sequence, b micro-batch, N inputs, M outputs, tp ranks, n guided positions of the s.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megastruct.structures.dense.layers import ColumnParallelLinear, RowParallelLinear


class Rows(NamedTuple):
    """The n guided positions of a sequence of s."""

    taken: Tensor  # int64 [n], ascending
    place: Tensor  # int64 [s]: a guided position's index in `taken`, 0 for the others
    mask: Tensor  # float32 [s]: 1 for a guided position, 0 for the others


class Choice(NamedTuple):
    """What the guide of one linear does in one forward."""

    alpha: Tensor  # float32 scalar
    own: Rows | None  # among the rank's s/tp positions; None: all are guided
    whole: Rows | None  # the same among all s positions


class ColumnGuide(ColumnParallelLinear):
    """weight [M/tp, N]: only the guided tokens are gathered."""

    def forward(self, x: Tensor, y: Tensor, bias: Tensor | None, choice: Choice | None) -> Tensor:  # type: ignore[override]
        """Blend x [s/tp, b, N] and y = S x + b [s, b, M/tp] to o [s, b, M/tp]; without a choice o = y."""
        if choice is None:
            return keep_gradient(y, self.weight)
        guided = super().forward(take(x, choice.own))  # [n, b, M/tp]
        return blend(y, guided if bias is None else guided + bias, choice.alpha, choice.whole)


class RowGuide(RowParallelLinear):
    """weight [M, N/tp]: only the guided tokens are reduced and scattered."""

    def forward(self, x: Tensor, y: Tensor, bias: Tensor | None, choice: Choice | None) -> Tensor:  # type: ignore[override]
        """Blend x [s, b, N/tp] and y = S x + b [s/tp, b, M] to o [s/tp, b, M]; without a choice o = y."""
        if choice is None:
            return keep_gradient(y, self.weight)
        guided = super().forward(take(x, choice.whole))  # [n/tp, b, M]
        return blend(y, guided if bias is None else guided + bias, choice.alpha, choice.own)


def blend(y: Tensor, guided: Tensor, alpha: Tensor, rows: Rows | None) -> Tensor:
    """Compute alpha guided + (1 - alpha) y at the guided positions, y at the others.

    y [s, b, M], guided [n, b, M] -> [s, b, M] in the dtype of y; the sum of bf16 operands is made in float32.
    """
    if rows is None:
        weight = alpha.view(1, 1, 1)
    else:
        weight = (alpha * rows.mask).view(-1, 1, 1)
        guided = _Spread.apply(guided, rows.taken, rows.place)
    return (y * (1.0 - weight) + guided * weight).to(y.dtype)


def take(x: Tensor, rows: Rows | None) -> Tensor:
    """The guided positions of x: [s, b, N] -> [n, b, N]."""
    return x if rows is None else _Take.apply(x, *rows)


def keep_gradient(y: Tensor, weight: Tensor) -> Tensor:
    """Return y [s, b, M] itself, and give `weight` a gradient of zeros.

    A guide that is skipped needs a gradient nevertheless. Otherwise ranks would disagree on which parameters have one,
    and what the optimizer does to the guide would depend on the ZeRO stage.
    """
    return _KeepGradient.apply(y, weight) if torch.is_grad_enabled() else y


class _Take(torch.autograd.Function):
    """x[taken]. Both directions read rows, none scatters: without atomic additions every run is bit-equal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taken: Tensor, place: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(place, mask)
        return x.index_select(0, taken)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        place, mask = ctx.saved_tensors
        [gradient] = gradients
        return gradient.index_select(0, place) * mask.view(-1, 1, 1).to(gradient.dtype), None, None, None


class _Spread(torch.autograd.Function):
    """Guided rows at their positions. The values at all other positions are unused, and their gradient is zero."""

    @staticmethod
    def forward(ctx: Any, guided: Tensor, taken: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(taken)
        return guided.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        [taken] = ctx.saved_tensors
        return gradients[0].index_select(0, taken), None, None


class _KeepGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], gradients[0].new_zeros(ctx.shape, dtype=ctx.dtype)
