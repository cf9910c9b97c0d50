"""What all sharded layers share: parameters that know which part of the global one they are, and their first weights.

A layer is given its `TensorGroup`; over a group of one rank it is the layer of one process. Its parameters have the
same names and the same global meaning as those of the layer of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from megastruct.parallel.collectives import sum_gradient
from megastruct.parallel.groups import TensorGroup
from megastruct.parallel.seeds import Names
from megastruct.parallel.shards import ShardSpec
from megastruct.structures.linear import SeededLayer, StructuredLinear, check_sizes, empty_weights
from megastruct.structures.numbers import Form, Widths

Whole = TypeVar("Whole", bound=SeededLayer)  # the layer of one process


class ShardedModule(nn.Module):
    """A module whose first weights depend on names alone, and of which each tensor-parallel rank may hold a part."""

    @property
    def tensor_rank(self) -> int:
        """This rank in the tensor-parallel group."""
        raise NotImplementedError

    def draw_weights(self, names: Names) -> dict[str, Tensor]:
        """All global parameters, by the names of `named_parameters`: float32, on the CPU.

        They come from the random streams named by `names` (the seed and the module's full name), so they do not depend
        on what else is built, in which order or where. Threads may call this for several modules at a time.
        """
        raise NotImplementedError

    @torch.no_grad()
    def load_whole(self, parameters: Mapping[str, Tensor]) -> None:
        """Take this rank's part of the global parameters, which are given by name, bit for bit.

        Its memory becomes the parameter's, so that what a parameter held before needs none.
        """
        for name, parameter in self.named_parameters():
            spec = getattr(parameter, "shard_spec", None)
            part = parameters[name] if spec is None else spec.shard(parameters[name], self.tensor_rank)
            parameter.data = part.to(parameter.device, parameter.dtype)

    def init_weights(self, names: Names) -> None:
        """Draw the weights and take this rank's part of them, as a `SeededLayer` fills itself."""
        self.load_whole(self.draw_weights(names))


def global_shape(parameter: Tensor) -> torch.Size:
    """The shape of the tensor that a parameter is, or of which it is a part."""
    return getattr(parameter, "global_shape", parameter.shape)


class ShardedLayer(ShardedModule, Generic[Whole]):
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
        """Register this rank's part of the parameter `name`, of the dtype that torch defaults to.

        Raises ValueError if a rank would have no part, or, unless `uneven`, if the ranks' parts would differ in shape.
        """
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
        """A replicated parameter for use on this rank's share of the tokens.

        Its gradient is summed over the group, in every backward or once a step (`TensorGroup.sums_once`).
        """
        return sum_gradient(parameter, self.tp)

    def replicated_bias(self) -> Tensor | None:
        """The bias [M] as `replicated` gives it; None without a bias."""
        return None if self.bias is None else self.replicated(self.bias)

    def output_bias(self) -> Tensor | None:
        """The bias as this rank adds it to its outputs: its own part, or the whole one for the rank's own tokens."""
        return self.bias if hasattr(self.bias, "shard_spec") else self.replicated_bias()

    def unsharded(self) -> Whole:
        """A new layer of one process with parameters of the same names and global shapes."""
        raise NotImplementedError

    def draw_unsharded(self, names: Names) -> Whole:
        """The unsharded layer with its first weights, from the random streams named by `names`."""
        with empty_weights():
            whole = self.unsharded()
        whole.init_weights(names)
        return whole

    @override
    def draw_weights(self, names: Names) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self.draw_unsharded(names).named_parameters()}

    @property
    @override
    def tensor_rank(self) -> int:
        return self.tp.rank


class ShardedLinear(ShardedLayer[StructuredLinear]):
    """A linear layer N -> M over the ranks. A structure sets `linear` and `form`, and says how its factors are cut.

    The column form maps x [s/tp, b, N] to [s, b, M/tp], the row form x [s, b, N/tp] to [s/tp, b, M].
    """

    linear: ClassVar[type[StructuredLinear]]
    form: ClassVar[Form]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tp: TensorGroup,
        bias: bool = True,
        init_std: float | None = 0.02,
        **sizes: int,
    ) -> None:
        """Register this rank's part of the factors and the bias, which is sharded in the column form only.

        Raises SizeError for sizes that do not fit the widths or the ranks, with the nearest that do.
        """
        super().__init__(tp)
        column, numbers = self.form == "column", self.linear.numbers
        names = ("in_features", "out_features") if column else ("out_features", "in_features")
        outer, inner = (in_features, out_features) if column else (out_features, in_features)
        check_sizes(numbers, Widths(outer, inner, tp.size, *names), sizes)
        self.in_features, self.out_features, self.sizes, self.init_std = in_features, out_features, sizes, init_std
        self.register_parameter("bias", None)
        shapes, specs = numbers.factor_shapes(in_features, out_features, sizes), self.factor_specs(tp.size)
        self.factor_names = tuple(shapes)
        for name, shape in shapes.items():
            self.add_parameter(name, shape, specs.get(name))
        if bias:
            self.add_parameter("bias", (out_features,), ShardSpec.along(0, tp.size) if column else None)

    def factor_specs(self, tp_size: int) -> dict[str, ShardSpec]:
        """How each sharded factor is cut over the ranks, by name. All other factors are replicated."""
        raise NotImplementedError

    def factors(self) -> list[Tensor]:
        """This rank's part of every factor."""
        return [getattr(self, name) for name in self.factor_names]

    def forward(self, x: Tensor) -> Tensor:
        """Map x as the form says.

        One rank calls `apply` of the structure's `maths.py`: there the compiler keeps the layout of the neighbouring
        operators, and a kernel that is added there is the one that trains.
        """
        if self.tp.size == 1:
            return self.linear.maths.apply(x, *self.factors(), bias=self.bias)
        return self.forward_sharded(x)

    def forward_sharded(self, x: Tensor) -> Tensor:
        """The forward on more than one rank."""
        raise NotImplementedError

    @override
    def unsharded(self) -> StructuredLinear:
        bias = self.bias is not None
        return self.linear(self.in_features, self.out_features, bias=bias, init_std=self.init_std, **self.sizes)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """The equal dense weight [M, N] of the whole layer, in float32. Collective over the group."""
        return self.linear.maths.to_dense(*(whole_parameter(factor, self.tp).float() for factor in self.factors()))


LinearBuilder = Callable[[int, int], ShardedLinear]  # (in_features, out_features) -> layer


def whole_parameter(parameter: Tensor, tp: TensorGroup) -> Tensor:
    """The global parameter from the group's parts, as a copy. Collective over the group."""
    own, spec = parameter.detach().contiguous(), getattr(parameter, "shard_spec", None)
    if spec is None:
        return own.clone()
    parts = [torch.empty_like(own) for _ in range(tp.size)]
    dist.all_gather(parts, own, group=tp.group)
    return spec.unshard(parts)
