"""Puts the layers of a model in their place, one after another.

Each gets its first weights, is moved to the device in the precision of the training, and under ZeRO 3 is cut over the
replicas.

DeepSpeed does all this with the whole model at a time, on every rank. Then each rank of a machine would hold the whole
of it in fp32 in the host's memory at once.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megastruct.config.schema import Config
from megastruct.engine import zero
from megastruct.models.first_weights import draw_first_weights
from megastruct.parallel.groups import StageGroup, TensorGroup, make_stage_group
from megastruct.parallel.topology import Topology
from megastruct.structures.sharded import ShardedModule


class Placing:
    """How the layers of this rank come to their place. Made before DeepSpeed's engine, which then finds them there."""

    def __init__(
        self,
        layers: Sequence[tuple[str, nn.Module]],
        config: Config,
        topology: Topology,
        tp: TensorGroup,
        device: torch.device,
        replicas: Any,
        stage: StageGroup,
        drawn: bool,
    ) -> None:
        """`layers`: with their full names. `replicas`: the process group of the ranks that have the same parts of them.

        Unless the weights are `drawn`, they hold uninitialised memory: a checkpoint is to be loaded.
        """
        self.layers, self.config, self.topology, self.tp, self.device = layers, config, topology, tp, device
        self.replicas, self.stage, self.drawn = replicas, stage, drawn

    def __call__(self, deepspeed_config: dict[str, Any], mpu: Any) -> None:
        """Place all layers. `deepspeed_config` and `mpu` as for `deepspeed.initialize`. Collective over the stage."""
        dtype = torch.bfloat16 if self.config.training.precision == "bf16" else torch.float32

        def place(layer: nn.Module) -> None:
            for parameter in layer.parameters():  # buffers keep their precision
                parameter.data = parameter.data.to(self.device, dtype).contiguous()
            layer.to(self.device)
            if self.config.parallel.zero_stage == 3:
                zero.partition(layer, self.layers[0][1], self.replicas, dtype, deepspeed_config, mpu)
            _give_freed_memory_back()

        for _, layer in self.layers:
            _leave_shapes_only(layer, self.device)
        if self.drawn:
            with self._sharing_group() as group:
                draw_first_weights(self.layers, self.config.run.seed, group, self.device, place)
        else:
            for _, layer in self.layers:
                place(layer)

    @contextlib.contextmanager
    def _sharing_group(self) -> Iterator[Any]:
        """The process group of all ranks that hold parts of the same layers; None for one rank."""
        if self.topology.tp_size == 1:
            yield self.replicas
        elif self.topology.dp_size == 1:
            yield self.tp.group
        elif self.stage.group is not None:
            yield self.stage.group
        else:
            group = make_stage_group(self.topology).group
            yield group
            dist.destroy_process_group(group)


def _leave_shapes_only(layer: nn.Module, device: torch.device) -> None:
    """Leave the parameters that will be drawn or read from a checkpoint their shapes, on the device, but no memory."""
    for module in layer.modules():
        if isinstance(module, ShardedModule):
            for parameter in module.parameters():
                parameter.data = torch.empty(1, dtype=parameter.dtype, device=device).expand(parameter.shape)


def _give_freed_memory_back() -> None:
    """Have the C library return to the host what a layer has needed on its way, instead of keeping it for later."""
    with contextlib.suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def in_place(deepspeed_config: dict[str, Any], mpu: Any) -> None:
    """The `Placing` of layers that are in their place already."""


Place = Callable[[dict[str, Any], Any], None]
