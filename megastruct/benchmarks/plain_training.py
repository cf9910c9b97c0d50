"""How the baseline of the step benchmark trains: with what PyTorch itself offers for one process and for several.

One process: fp32 weights, autocast in bf16, fused AdamW, everything compiled as one program if the config compiles.
Several: FSDP2 (`fully_shard`) over the replicas, and PyTorch's own tensor parallelism with sequence-parallel norms and
a vocabulary-parallel loss where the config has `parallel.tp`; blocks, and the loss without tensor parallelism, are
compiled one by one. The plan is that of torchtitan. There is no pipeline: the ranks of `parallel.pp` are replicas, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.profiler import record_function

from megastruct.benchmarks.plain_gpt import PlainBlock, PlainGPT
from megastruct.config.schema import Config
from megastruct.data.batch import Batch
from megastruct.errors import Problem
from megastruct.parallel.sizes import nearest_divisor
from megastruct.profiling.parts import LOSS_RANGE


class PlainTraining:
    """The dense model of a config, and its optimizer. Collective over the world, if there are several processes."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device, training = config, device, config.training
        self.sharded = dist.get_world_size() > 1
        self.replicas = dist.get_world_size() // config.parallel.tp
        self.replica = dist.get_rank() // config.parallel.tp
        self.micro_batch_size = baseline_micro_batch_size(config, self.replicas)
        self.model: nn.Module = _first_weights(config, device)
        if self.sharded:
            _shard(self.model, config, self.replicas, device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.optimizer.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        self.cross_entropy, self.loss = _cross_entropy, self._loss
        if training.compile and not self.sharded:
            self.loss = torch.compile(self._loss)
        elif training.compile and config.parallel.tp == 1:
            self.cross_entropy = torch.compile(_cross_entropy)

    @property
    def name(self) -> str:
        """What it is, in a few words."""
        if not self.sharded:
            return "PyTorch, dense"
        tp = self.config.parallel.tp
        return f"PyTorch, dense, FSDP2 x {self.replicas}" + (f", TP x {tp}" if tp > 1 else "")

    def train_batch(self, batches: Iterator[Batch]) -> float:
        """One optimizer step over a global batch; returns its loss, that of this replica if there are several."""
        count = self.config.training.global_batch_size // (self.replicas * self.micro_batch_size)
        total = torch.zeros((), device=self.device)
        for index in range(count):
            batch = next(batches)
            if isinstance(self.model, FSDPModule):  # sums gradients, and gives whole weights back, once a step
                self.model.set_requires_gradient_sync(index == count - 1)
                self.model.set_reshard_after_backward(index == count - 1 or self.config.parallel.zero_stage == 3)
            with loss_parallel() if self.config.parallel.tp > 1 else contextlib.nullcontext():
                loss = self.loss(batch.ids.to(self.device), batch.labels.to(self.device))
                (loss / count).backward()
            total += loss.detach()
        largest = self.config.optimizer.gradient_clipping
        if largest:
            nn.utils.clip_grad_norm_(self.model.parameters(), largest)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total / count)

    def _loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        in_bf16 = self.config.training.precision == "bf16" and not self.sharded
        with torch.autocast(self.device.type, torch.bfloat16, enabled=in_bf16):
            logits = self.model(ids)
        with record_function(LOSS_RANGE) if not torch.compiler.is_compiling() else contextlib.nullcontext():
            loss = self.cross_entropy(logits, labels)
        return loss.full_tensor() if isinstance(loss, DTensor) else loss


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def baseline_micro_batch_size(config: Config, replicas: int) -> int:
    """The config's micro-batch size, or the next smaller one that divides a replica's part of the global batch."""
    samples = config.training.global_batch_size // replicas
    return next(size for size in range(min(config.training.micro_batch_size, samples), 0, -1) if samples % size == 0)


def baseline_problems(config: Config, world_size: int) -> Iterator[Problem]:
    """Why there can be no baseline for a config that this project trains."""
    model, tp, batch = config.model, config.parallel.tp, config.training.global_batch_size
    replicas = world_size // tp
    if batch % replicas:
        found = f"{batch} is not divisible by {replicas}: the baseline has no pipeline, so that many ranks are replicas"
        yield Problem(
            "training.global_batch_size", found, f"training.global_batch_size={batch * replicas}, or --no-baseline"
        )
    for key, size in (("vocab_size", model.vocab_size), ("num_key_value_heads", model.kv_heads)):
        if size % tp:
            found = f"{size} is not divisible by parallel.tp = {tp}, as PyTorch's tensor parallelism wants it"
            yield Problem(f"model.{key}", found, f"parallel.tp={nearest_divisor(size, tp)}, or --no-baseline")


def _first_weights(config: Config, device: torch.device) -> PlainGPT:
    """The whole model in float32 on the device, with the same random weights on all ranks."""
    with torch.device(device):
        model = PlainGPT(config.model, config.training.activation_checkpointing is True)
    generator = torch.Generator(device).manual_seed(config.run.seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0.0, config.model.init_std, generator=generator)
    return model


def _shard(model: nn.Module, config: Config, replicas: int, device: torch.device) -> None:
    """Cut the model over the tensor-parallel ranks and the replicas, in place. Collective."""
    assert isinstance(model, PlainGPT)
    training, tp = config.training, config.parallel.tp
    mesh = init_device_mesh(device.type, (replicas, tp), mesh_dim_names=("dp", "tp"))
    if tp > 1:
        _parallelize(model, mesh["tp"], with_head_norms=config.model.qk_norm)
        model.tie()  # each of the two has got a parameter of its own
    precision = MixedPrecisionPolicy(cast_forward_inputs=False)  # angles stay in float32
    if training.precision == "bf16":
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    whole = config.parallel.zero_stage < 3  # keeps the weights of the forward for the backward, as ZeRO 1 and 2 do
    for block in model.blocks:
        if training.compile:
            block.compile()
        fully_shard(block, mesh=mesh["dp"], mp_policy=precision, reshard_after_forward=not whole)
    fully_shard(model, mesh=mesh["dp"], mp_policy=precision, reshard_after_forward=False)


def _parallelize(model: PlainGPT, mesh: DeviceMesh, with_head_norms: bool) -> None:
    sequence = Shard(1)  # of [b, s, d]
    whole: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=sequence),
        "final_norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=sequence, output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh, whole)
    of_block: dict[str, ParallelStyle] = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(sequence, None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        **{f"attention.{name}": ColwiseParallel() for name in ("query", "key", "value")},
        "attention.out": RowwiseParallel(output_layouts=sequence),
        "mlp_norm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(sequence,), desired_input_layouts=(Replicate(),)),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=sequence),
    }
    for block in model.blocks:
        assert isinstance(block, PlainBlock)
        plan = dict(of_block)
        if block.mlp.gate is not None:
            plan["mlp.gate"] = ColwiseParallel()
        if with_head_norms:  # of [b, s, heads/tp, dh]
            plan |= {
                f"attention.{name}_norm": SequenceParallel(sequence_dim=2, use_local_output=True)
                for name in ("query", "key")
            }
        parallelize_module(block, mesh, plan)
