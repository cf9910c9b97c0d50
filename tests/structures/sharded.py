"""Sharded layers on real ranks: what a rank does with one, and how the parent puts the ranks' parts together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megastruct.parallel.collectives import count_bytes
from megastruct.parallel.groups import TensorGroup
from megastruct.parallel.shards import ShardSpec

SEQUENCE, BATCH = 12, 2  # 12 divides by 1, 2, 3 and 4


def world() -> TensorGroup:
    """All ranks as one tensor-parallel group; a single one needs none."""
    if dist.get_world_size() == 1:
        return TensorGroup()
    return TensorGroup(dist.group.WORLD, dist.get_world_size(), dist.get_rank())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own(x: Tensor, tp: TensorGroup, dim: int) -> Tensor:
    """The rank's part, with the strides of a transposed tensor."""
    return x.chunk(tp.size, dim)[tp.rank].transpose(0, -1).contiguous().transpose(0, -1)


@dataclass
class Part:
    """What a rank has after forward and backward."""

    output: Tensor
    input_gradient: Tensor
    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]
    marks: dict[str, dict[str, Any]]
    forward_bytes: list[tuple[str, int]] = field(default_factory=list)
    backward_bytes: list[tuple[str, int]] = field(default_factory=list)


def run_part(module: nn.Module, x: Tensor, output_gradient: Tensor) -> Part:
    x = x.detach().requires_grad_()
    with count_bytes() as forward_bytes:
        y = module(x)
    with count_bytes() as backward_bytes:
        y.backward(output_gradient)
    assert x.grad is not None
    parameters = dict(module.named_parameters())
    return Part(
        y.detach(),
        x.grad,
        {name: p.detach() for name, p in parameters.items()},
        {name: p.grad for name, p in parameters.items() if p.grad is not None},
        {name: dict(vars(p)) for name, p in parameters.items()},
        forward_bytes,
        backward_bytes,
    )


def assemble(parts: list[Part], name: str, what: str) -> Tensor:
    """The global parameter or gradient; of a replicated one, the one that all ranks have, bit for bit."""
    tensors = [getattr(part, what)[name] for part in parts]
    marks = parts[0].marks[name]
    if "shard_spec" not in marks:
        assert "tensor_model_parallel" not in marks
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors), f"{what} of {name} differ between ranks"
        return tensors[0]
    assert marks["tensor_model_parallel"] is True
    spec: ShardSpec = marks["shard_spec"]
    full = spec.unshard(tensors)
    assert full.shape == marks["global_shape"]
    return full


def check_against(parts: list[Part], reference: Part, output_dim: int, input_dim: int, bound: float = 1e-12) -> None:
    """Output, input gradient and every parameter's gradient, put together, are the reference's."""
    _close("output", torch.cat([part.output for part in parts], output_dim), reference.output, bound)
    joined = torch.cat([part.input_gradient for part in parts], input_dim)
    _close("input gradient", joined, reference.input_gradient, bound)
    assert parts[0].gradients.keys() == reference.gradients.keys() == reference.parameters.keys()
    for name, gradient in reference.gradients.items():
        assert torch.equal(assemble(parts, name, "parameters"), reference.parameters[name]), f"weights of {name}"
        _close(f"gradient of {name}", assemble(parts, name, "gradients"), gradient, bound)


def _close(what: str, found: Tensor, wanted: Tensor, bound: float) -> None:
    assert found.shape == wanted.shape, what
    assert wanted.abs().max() > 1e-3, f"{what} is too small to compare"
    error = (found - wanted).abs().max() / wanted.abs().max()
    assert error <= bound, f"{what}: relative error {error:.1e}"
