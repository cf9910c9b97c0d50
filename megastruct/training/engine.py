"""DeepSpeed behind one small interface: train a batch, evaluate, set the learning rate.

Two builders, because DeepSpeed's pipelines work with ZeRO 0 and 1 only: `PipelineModule` at every pipeline depth
(also one) for ZeRO 0 and 1, the plain model for ZeRO 2 and 3.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from torch import Tensor, nn

from megastruct.config.deepspeed import deepspeed_config
from megastruct.config.schema import Config
from megastruct.data.batch import Batch
from megastruct.models.block import Block
from megastruct.models.gpt import build_gpt
from megastruct.models.loss import make_loss
from megastruct.models.pipeline import GPTPipeline, deepspeed_topology
from megastruct.parallel.groups import TensorGroup, make_tensor_group
from megastruct.parallel.topology import Topology
from megastruct.training.optimizer import GradientClipper, build_optimizer


class Engine:
    """What the loop needs of DeepSpeed. Losses are means over all tokens of the global batch, equal on all ranks."""

    def __init__(
        self, module: nn.Module, config: Config, topology: Topology, tp: TensorGroup, device: torch.device
    ) -> None:
        self.config, self.topology, self.tp, self.device = config, topology, tp, device
        optimizer = build_optimizer(module, config.optimizer, device.type)
        with contextlib.redirect_stdout(io.StringIO()):  # its optimizers print their memory with print()
            self.deepspeed, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=deepspeed_config(config, topology.dp_size),
                mpu=self._mpu(),
                dist_init_required=False,
            )
        self.clipper: GradientClipper | None = None
        if config.parallel.zero_stage == 0:
            model_group = module._grid.get_model_parallel_group()  # all stages and tensor ranks of one replica
            self.clipper = GradientClipper(
                module.parameters(), config.optimizer.gradient_clipping, model_group, counts_replicated=tp.rank == 0
            )
            optimizer.register_step_pre_hook(self.clipper)
        if config.training.compile:
            self._compile()

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    @property
    def zero_optimizer(self) -> Any:
        """DeepSpeed's optimizer around ours; ours itself where ZeRO is off."""
        return self.deepspeed.optimizer

    @property
    def reads_data(self) -> bool:
        """Only the first and the last stage of a pipeline take batches."""
        rank = dist.get_rank()
        return self.topology.is_first_stage(rank) or self.topology.is_last_stage(rank)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's parameters under the names that hold in every layout."""
        raise NotImplementedError

    def train_batch(self, batches: Iterator[Batch] | None) -> float:
        """Forward, backward and optimizer step over one global batch; `batches` gives the rank's micro-batches."""
        raise NotImplementedError

    def evaluate(self, batches: Sequence[Batch], num_micro_batches: int) -> float:
        """Mean loss over `num_micro_batches` micro-batches per replica, without gradients."""
        raise NotImplementedError

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate

    def gradient_norm(self) -> float:
        """Global norm of the last step's gradient, before clipping."""
        return self.clipper.norm if self.clipper else float(self.deepspeed.get_global_grad_norm())

    def _mpu(self) -> Any:
        """DeepSpeed's view of the groups, where the module does not bring it."""
        return None

    def _compile(self) -> None:
        for module in self.module.modules():
            if isinstance(module, Block):
                module.compile()


class PipelineEngine(Engine):
    """ZeRO 0 and 1, any number of stages."""

    def __init__(self, config: Config, topology: Topology, device: torch.device) -> None:
        tp = make_tensor_group(topology)
        module = GPTPipeline(config, topology, tp, make_loss(config, tp))
        super().__init__(module, config, topology, tp, device)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(self.module.canonical_name(name), p) for name, p in self.module.named_parameters()]

    def train_batch(self, batches: Iterator[Batch] | None) -> float:
        return float(self.deepspeed.train_batch(batches))

    def evaluate(self, batches: Sequence[Batch], num_micro_batches: int) -> float:
        iterator = iter(batches) if self.reads_data else None
        return float(self.deepspeed.eval_batch(iterator, num_micro_batches=num_micro_batches))


class PlainEngine(Engine):
    """ZeRO 2 and 3, one stage."""

    def __init__(self, config: Config, topology: Topology, device: torch.device) -> None:
        tp = make_tensor_group(topology)
        super().__init__(build_gpt(config, tp), config, topology, tp, device)
        self.loss = make_loss(config, tp)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.module.named_parameters())

    def train_batch(self, batches: Iterator[Batch] | None) -> float:
        assert batches is not None
        self.deepspeed.train()
        accumulation = self.deepspeed.gradient_accumulation_steps()
        total = torch.zeros((), device=self.device)
        for _ in range(accumulation):
            loss = self._loss(next(batches))
            self.deepspeed.backward(loss)
            self.deepspeed.step()
            total += loss.detach()
        return self._mean(total / accumulation)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], num_micro_batches: int) -> float:
        self.deepspeed.eval()
        total = torch.zeros((), device=self.device)
        for batch in batches[:num_micro_batches]:
            total += self._loss(batch)
        return self._mean(total / num_micro_batches)

    def _loss(self, batch: Batch) -> Tensor:
        return self.loss(self.deepspeed(batch.ids.to(self.device)), batch.labels.to(self.device))

    def _mean(self, value: Tensor) -> float:
        dist.all_reduce(value)  # the ranks of a tensor-parallel group have the same loss
        return float(value / self.topology.world_size)

    def _mpu(self) -> Any:
        return PipelineParallelGrid(topology=deepspeed_topology(self.topology))


def build_engine(config: Config, topology: Topology, device: torch.device) -> Engine:
    """The engine for a config that `config/checks.py` accepted. torch.distributed is initialised."""
    kind = PlainEngine if config.parallel.zero_stage >= 2 else PipelineEngine
    return kind(config, topology, device)
