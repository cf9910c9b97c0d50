"""What all sharded layers share: parameters that know their part of the global one, and initial weights from it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megastruct.layers.linear import Names
from megastruct.parallel.collectives import sum_gradient
from megastruct.parallel.groups import TensorGroup
from megastruct.parallel.shards import ShardSpec


class ShardedLayer(nn.Module):
    """A layer of which every rank of `tp` holds a part.

    A sharded parameter carries `shard_spec` and `global_shape` (which part of which tensor it is) and
    `tensor_model_parallel = True` (DeepSpeed counts it on every rank in the gradient norm). A replicated one carries
    none of them.
    """

    bias: nn.Parameter | None

    def __init__(self, tp: TensorGroup) -> None:
        super().__init__()
        self.tp = tp

    def add_parameter(
        self, name: str, global_shape: tuple[int, ...], spec: ShardSpec | None = None, uneven: bool = False
    ) -> None:
        """Register this rank's part of the parameter `name`. Raises ValueError if the ranks' parts would differ in
        shape, unless `uneven`; a rank without any part is refused always."""
        if spec is None or self.tp.size == 1:
            self.register_parameter(name, nn.Parameter(torch.empty(global_shape)))
            return
        shapes = [spec.local_shape(global_shape, rank) for rank in range(self.tp.size)]
        if 0 in shapes[-1] or (not uneven and len(set(shapes)) > 1):
            raise ValueError(f"{name} {list(global_shape)} does not divide over {self.tp.size} ranks: {shapes}")
        parameter = nn.Parameter(torch.empty(shapes[self.tp.rank]))
        parameter.shard_spec = spec  # type: ignore[attr-defined]
        parameter.global_shape = torch.Size(global_shape)  # type: ignore[attr-defined]
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.register_parameter(name, parameter)

    def replicated(self, parameter: Tensor) -> Tensor:
        """A replicated parameter, applied to this rank's share of tokens: its gradient is summed over the group, in the
        backward or once a step (`TensorGroup.sums_once`)."""
        return sum_gradient(parameter, self.tp)

    def replicated_bias(self) -> Tensor | None:
        """`self.bias`, if there is one, as `replicated` gives it."""
        return None if self.bias is None else self.replicated(self.bias)

    def output_bias(self) -> Tensor | None:
        """`self.bias` as this rank adds it to its outputs: its own part, or the whole for the rank's own tokens."""
        return self.bias if hasattr(self.bias, "shard_spec") else self.replicated_bias()

    def unsharded(self) -> nn.Module:
        """A new layer of one process with the same global parameters."""
        raise NotImplementedError

    def init_weights(self, names: Names) -> nn.Module:
        """Fill in this rank's part of what the unsharded layer's `init_weights(names)` makes, bit for bit; returns that
        layer."""
        whole = self.unsharded()
        whole.init_weights(names)  # type: ignore[operator]
        self.load_whole({name: parameter.detach() for name, parameter in whole.named_parameters()})
        return whole

    @torch.no_grad()
    def load_whole(self, parameters: Mapping[str, Tensor]) -> None:
        """Take this rank's part of global parameters, by name."""
        for name, parameter in self.named_parameters():
            spec = getattr(parameter, "shard_spec", None)
            parameter.copy_(parameters[name] if spec is None else spec.shard(parameters[name], self.tp.rank))
