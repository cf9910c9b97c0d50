"""DeepSpeed behind one small interface: train a batch, evaluate, set the learning rate.

Two builders, because DeepSpeed's pipelines work with ZeRO 0 and 1 only: `PipelineModule` at every pipeline depth
(also one) for ZeRO 0 and 1, the plain model for ZeRO 2 and 3.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.schedule import ReduceTiedGrads
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from torch import Tensor, nn
from typing_extensions import override

from megastruct.config.schema import Config
from megastruct.data.batch import Batch
from megastruct.engine import zero
from megastruct.engine.config import deepspeed_config
from megastruct.engine.internals import check_internals
from megastruct.engine.norms import set_up_norm
from megastruct.engine.optimizer import build_optimizer, parameter_roles
from megastruct.engine.pipeline import GPTPipeline, deepspeed_topology
from megastruct.engine.placing import Place, Placing, in_place
from megastruct.engine.row_losses import RecordingLoss
from megastruct.engine.whole_matrices import share_whole_matrices, stage_group
from megastruct.models.block import compile_blocks
from megastruct.models.gpt import GPT
from megastruct.models.guidance import Guidance
from megastruct.optimizers import MASTER, OPTIMIZERS, Optimizer, Role
from megastruct.parallel.collectives import sum_gradients
from megastruct.parallel.groups import StageGroup, TensorGroup, make_tensor_group
from megastruct.parallel.topology import Topology
from megastruct.planning.steps import guided_steps


class Engine:
    """What the loop needs of DeepSpeed. Losses are means over all tokens of the global batch, equal on all ranks."""

    def __init__(
        self,
        module: nn.Module,
        config: Config,
        topology: Topology,
        tp: TensorGroup,
        device: torch.device,
        stage_group: StageGroup,
        place: Place,
        mpu: Any = None,
    ) -> None:
        """`place` puts the module's layers in their place. `mpu`: DeepSpeed's view of the groups, where the module does
        not bring it."""
        self.config, self.topology, self.tp, self.device, self.mpu = config, topology, tp, device, mpu
        self.stage_group = stage_group
        self.loss: RecordingLoss = module.loss_fn if isinstance(module, GPTPipeline) else RecordingLoss(config, tp)
        self.roles: dict[nn.Parameter, Role] = parameter_roles(module)  # ZeRO 3 will change the parameters' shapes
        optimizer = build_optimizer(module, config, device.type)
        values = deepspeed_config(config, topology.dp_size, sum(p.numel() for p in module.parameters()))
        place(values, mpu)
        with contextlib.redirect_stdout(io.StringIO()):  # its optimizers print their memory with print()
            self.deepspeed, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=values,
                mpu=mpu,
                dist_init_required=False,
            )
        self.clipper = set_up_norm(
            self.zero_optimizer, module, config, topology.pp_size, counts_replicated=tp.rank == 0
        )
        share_whole_matrices(self.zero_optimizer, self.roles, config, topology, stage_group)
        if config.training.compile:
            compile_blocks(module, config.training.seq_length, device)

    @property
    def module(self) -> Any:
        """The model: a `GPT`, or a `GPTPipeline` with this rank's stage."""
        return self.deepspeed.module

    @property
    def zero_optimizer(self) -> Any:
        """DeepSpeed's optimizer around ours; ours itself where ZeRO is off."""
        return self.deepspeed.optimizer

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 to 3."""
        return self.config.parallel.zero_stage

    @property
    def optimizer_record(self) -> Optimizer:
        """What the optimizer's record says of its groups and its state."""
        return OPTIMIZERS[self.config.optimizer.kind]

    def state_kinds(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """The kinds of state that the optimizer keeps of a parameter, beside its master."""
        return self.optimizer_record.group_of(self.roles[parameter]).state

    def saved_kinds(self) -> dict[str, tuple[str, ...]]:
        """What a checkpoint keeps of each of this rank's parameters, by global name: its master and its state."""
        return {name: (MASTER, *self.state_kinds(parameter)) for name, parameter in self.named_parameters()}

    def gathered(self, parameters: Sequence[Tensor]) -> AbstractContextManager[None]:
        """A context in which parameters are whole under ZeRO 3, too. Collective over the data-parallel group."""
        return zero.gathered(parameters, self.zero_stage)

    @property
    def reads_data(self) -> bool:
        """Only the first and the last stage of a pipeline take batches."""
        rank = dist.get_rank()
        return self.topology.is_first_stage(rank) or self.topology.is_last_stage(rank)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's parameters under the names that hold in every layout."""
        return [(self.canonical_name(name), p) for name, p in self.module.named_parameters()]

    def canonical_name(self, name: str) -> str:
        """The name that holds in every layout, of a parameter or module of this engine's own module."""
        return name

    def train_batch(self, batches: Iterator[Batch] | None) -> float:
        """Forward, backward and optimizer step over one global batch; `batches` gives the rank's micro-batches."""
        raise NotImplementedError

    def evaluate(self, batches: Sequence[Batch], num_micro_batches: int, alpha: float = 0.0) -> float:
        """Mean loss over `num_micro_batches` micro-batches per replica, without gradients.

        `alpha`: the guides' part, of all tokens; 0 is the model as it will be used.
        """
        if self.guidance:
            self.guidance.start_evaluation(alpha)
        return self._evaluate(batches, num_micro_batches)

    def _evaluate(self, batches: Sequence[Batch], num_micro_batches: int) -> float:
        raise NotImplementedError

    @property
    def guidance(self) -> Guidance | None:
        """What the guides of self-guided training are told; None without guides."""
        return self.module.guidance

    def set_alpha(self, alpha: float, step: int) -> None:
        """The guides' part in the blend in the next training step, the one after `step` finished ones."""
        if self.guidance:
            self.guidance.start_step(step, alpha)

    def without_guides(self) -> Engine:
        """Give up this engine, and all memory of its optimizer; returns one for the model without its guides.

        The new one's weights and state are still to be loaded.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Let go of all that DeepSpeed holds: partitions, moments, buffers, the last outputs."""
        zero.release(self.deepspeed)
        del self.deepspeed, self.clipper, self.roles  # they hold the guides' weights

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next step: that of every group is `learning_rate` times its `lr_scale`."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]

    def set_batch_size(self, global_batch_size: int) -> None:
        """Set the number of samples of the next steps, a multiple of the micro-batches of all replicas."""
        zero.set_batch_size(self.deepspeed, global_batch_size)

    def gradient_norm(self) -> float:
        """Global norm of the last step's gradient, before clipping."""
        return self.clipper.norm if self.clipper else float(self.deepspeed.get_global_grad_norm())


class PipelineEngine(Engine):
    """ZeRO 0 and 1, any number of stages."""

    @override
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.tp.size > 1:
            self._sum_replicated_gradients()

    @classmethod
    def build(
        cls, config: Config, topology: Topology, device: torch.device, guided: bool, eod_id: int | None, drawn: bool
    ) -> PipelineEngine:
        """Build the stage of this rank. Collective over the world."""
        tp = make_tensor_group(topology, sums_once=True)
        guidance = make_guidance(config, topology, device) if guided else None
        module = GPTPipeline(config, topology, tp, RecordingLoss(config, tp), guidance, eod_id)
        stage, replicas = stage_group(config, topology), module.data_parallel_group
        place = Placing(module.own_layers, config, topology, tp, device, replicas, stage, drawn)
        return cls(module, config, topology, tp, device, stage, place)

    def _sum_replicated_gradients(self) -> None:
        """Have DeepSpeed sum the gradients of replicated parameters over the tensor-parallel group, after the last
        backward of a step and before it sums those of tied weights over stages and all over replicas."""
        tp, replicated = self.tp, [p for p in self.module.parameters() if not hasattr(p, "shard_spec")]
        in_bf16 = self.config.training.precision == "bf16"  # there it accumulates in fp32, beside the parameter
        instructions = self.deepspeed._INSTRUCTION_MAP

        def sum_and_go_on(engine: Any) -> None:
            gradients = [zero.accumulated_gradient(p, in_bf16) for p in replicated]
            sum_gradients([gradient for gradient in gradients if gradient is not None], tp)
            instructions[ReduceTiedGrads](engine)

        self.deepspeed._INSTRUCTION_MAP = {**instructions, ReduceTiedGrads: sum_and_go_on}

    @override
    def without_guides(self) -> PipelineEngine:
        module = self.module  # stays: a new one would make new process groups
        self.close()
        module.drop_guides()
        return PipelineEngine(module, self.config, self.topology, self.tp, self.device, self.stage_group, in_place)

    @override
    def canonical_name(self, name: str) -> str:
        return self.module.canonical_name(name)

    @override
    def train_batch(self, batches: Iterator[Batch] | None) -> float:
        return float(self.deepspeed.train_batch(batches))

    def _evaluate(self, batches: Sequence[Batch], num_micro_batches: int) -> float:
        iterator = iter(batches) if self.reads_data else None
        loss = float(self.deepspeed.eval_batch(iterator, num_micro_batches=num_micro_batches))
        for buffers in self.deepspeed.pipe_buffers.values():  # it would keep the last logits until they are replaced
            buffers[:] = [None] * len(buffers)
        return loss


class PlainEngine(Engine):
    """ZeRO 2 and 3, one stage."""

    @classmethod
    def build(
        cls, config: Config, topology: Topology, device: torch.device, guided: bool, eod_id: int | None, drawn: bool
    ) -> PlainEngine:
        """Build the model of this rank. Collective over the world."""
        tp = make_tensor_group(topology)
        guidance = make_guidance(config, topology, device) if guided else None
        mpu = PipelineParallelGrid(topology=deepspeed_topology(topology))
        module, stage = GPT(config, tp, guidance, eod_id, init=False), stage_group(config, topology)
        given = (config, topology, tp, device)
        place = Placing(module.named_layers(), *given, mpu.get_data_parallel_group(), stage, drawn)
        return cls(module, *given, stage, place, mpu)

    @override
    def without_guides(self) -> PlainEngine:
        parameters = list(self.module.parameters())
        eod_id = self.module.eod_id
        self.close()
        zero.empty_parameters(parameters)
        # A new module: ZeRO 3 has cut the old one's parameters, and tied them to its optimizer.
        module = GPT(self.config, self.tp, eod_id=eod_id, init=False)
        given, stage = (self.config, self.topology, self.tp, self.device), self.stage_group
        place = Placing(module.named_layers(), *given, self.mpu.get_data_parallel_group(), stage, drawn=False)
        return PlainEngine(module, *given, stage, place, self.mpu)

    @override
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
    def _evaluate(self, batches: Sequence[Batch], num_micro_batches: int) -> float:
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


def build_engine(
    config: Config,
    topology: Topology,
    device: torch.device,
    step: int = 0,
    eod_id: int | None = None,
    drawn: bool = True,
) -> Engine:
    """The engine for a config that `config/checks.py` accepted, after `step` finished steps, with the first weights.

    Unless the weights are `drawn`, they hold uninitialised memory: a checkpoint is to be loaded. The model has guides
    if the step is a guided one. torch.distributed is initialised. `eod_id`: the tokenizer's.
    Raises ValueError without it, if attention shall stay inside of documents.
    """
    check_internals()
    separate = config.training.document_attention == "separate"
    if separate and eod_id is None:
        raise ValueError("training.document_attention = separate needs the end-of-document id")
    kind = PlainEngine if config.parallel.zero_stage >= 2 else PipelineEngine
    guided = step < guided_steps(config)
    return kind.build(config, topology, device, guided, eod_id if separate else None, drawn)


def make_guidance(config: Config, topology: Topology, device: torch.device) -> Guidance:
    """What tells this rank's guides what to do in each forward."""
    return Guidance(config, topology.tp_size, topology.dp_rank(dist.get_rank()), topology.dp_size, device)
