"""What the tests of all two-factor structures share."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def check_against_reference(ops: ModuleType, arguments: list[Tensor], seed: int = 0) -> None:
    """Output and every gradient of apply(x, v, u[, bias]) in float64, and to_dense by the images of unit vectors."""
    results = []
    for function in (ops.apply, ops.apply_reference):
        inputs = [argument.clone().requires_grad_() for argument in arguments]
        y = function(*inputs)
        (y * draw(*y.shape, seed=seed)).sum().backward()
        results.append([y.detach(), *(x.grad for x in inputs)])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-10)
    x, v, u = arguments[:3]
    identity = torch.eye(x.shape[-1], dtype=x.dtype)
    torch.testing.assert_close(ops.apply(identity, v, u).T, ops.to_dense(v, u), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ops.apply_reference(identity, v, u).T, ops.to_dense(v, u), rtol=1e-10, atol=1e-10)


def check_non_contiguous(ops: ModuleType, x: Tensor, v: Tensor, u: Tensor) -> None:
    """Operands and gradients with other strides: [s, b, N] views, a slice of features, a broadcast gradient."""
    plain = ops.apply_reference(x, v, u)
    wide = torch.cat((x, x), dim=-1)
    for other in (x.transpose(0, 1).contiguous().transpose(0, 1), wide[..., : x.shape[-1]]):
        assert not other.is_contiguous()
        torch.testing.assert_close(ops.apply(other, v, u), plain)
    transposed = [t.mT.contiguous().mT for t in (v, u)]
    torch.testing.assert_close(ops.apply(x, *transposed), plain)
    gradients = []
    for function in (ops.apply, ops.apply_reference):
        inputs = [t.clone().requires_grad_() for t in (x, v, u)]
        function(*inputs).sum().backward()  # the gradient is one number, expanded
        gradients.append([t.grad for t in inputs])
    for fast, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, reference)


def check_bfloat16_and_autocast(ops: ModuleType, arguments: list[Tensor]) -> None:
    """bf16 keeps 8 bits: each of the two products may be off by some of their rounding steps, 2^-8."""
    exact = ops.apply(*arguments)
    bound = 0.02 * float(exact.abs().max())
    low = ops.apply(*(t.bfloat16() for t in arguments))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), exact, rtol=0, atol=bound)
    single = [t.float().requires_grad_() for t in arguments]
    with torch.autocast("cpu", torch.bfloat16):
        cast = ops.apply(*single)
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast.double(), exact, rtol=0, atol=bound)
    cast.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in single)


def check_compiled(ops: ModuleType, arguments: list[Tensor]) -> None:
    """One graph without breaks, with the same output and gradients."""
    torch.compiler.reset()
    compiled = torch.compile(ops.apply, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, ops.apply):
        inputs = [argument.clone().requires_grad_() for argument in arguments]
        y = function(*inputs)
        (y * y).sum().backward()
        results.append([y.detach(), *(x.grad for x in inputs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def check_orthonormal(weight: Tensor) -> None:
    """Each matrix [..., m, n] has orthonormal rows or columns, whichever are fewer."""
    w = weight.double() if weight.shape[-2] >= weight.shape[-1] else weight.double().mT
    identity = torch.eye(w.shape[-1], dtype=torch.float64)
    torch.testing.assert_close(w.mT @ w, identity.expand(*w.shape[:-2], -1, -1), rtol=0, atol=1e-6)
