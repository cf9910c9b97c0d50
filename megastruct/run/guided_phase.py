"""The end of the guided phase, which gives the guides' memory back; the factors' distance from their guides."""

from __future__ import annotations

import contextlib
import gc
import json
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megastruct.checkpoint.agreement import from_first_rank
from megastruct.checkpoint.store import checkpoint_folder
from megastruct.engine.engine import Engine
from megastruct.files import write_atomically
from megastruct.metrics.devices import memory_bytes
from megastruct.models.guidance import LINEARS
from megastruct.models.mlp import MLP
from megastruct.parallel.groups import TensorGroup
from megastruct.run.resume import finish_save, resume, save
from megastruct.run.run_folder import checkpoints_folder, run_folder

REPORT_FILE = "end_of_guided_phase.json"


def end_guided_phase(engine: Engine, step: int, cursor: np.ndarray, state: dict[str, Any]) -> Engine:
    """Go on without guides: their weights, gradients, fp32 masters and Adam moments are freed on every rank, the
    factors' state goes on untouched. Collective.

    The way is the one of every resume: a checkpoint of this step, which no longer has the guides, is loaded into an
    engine without them. So what is trained after the border is what a run that was killed here would train. Memory
    before and after, of every rank, is written to REPORT_FILE in the run folder.
    """
    before = memory_bytes(engine.device)
    folder = checkpoint_folder(checkpoints_folder(engine.config), step)
    finish_save()
    if not from_first_rank(folder.is_dir()):
        save(engine, step, cursor, state)
    engine = engine.without_guides()
    resume(engine, folder)
    gc.collect()
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()
    _report(engine, step, before, memory_bytes(engine.device))
    return engine


def _report(engine: Engine, step: int, before_bytes: int, after_bytes: int) -> None:
    own = torch.tensor([before_bytes, after_bytes], device=engine.device)
    ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, own)
    if dist.get_rank() == 0:
        memory = [{"before_bytes": int(rank[0]), "after_bytes": int(rank[1])} for rank in ranks]
        report = {"step": step, "ranks": memory}
        write_atomically(run_folder(engine.config) / REPORT_FILE, json.dumps(report, indent=1))


@torch.no_grad()
def guide_distances(engine: Engine) -> dict[str, float]:
    """|W - S| / |W| (Frobenius) of every guided linear, by name: 0 at the start; W the guide, S the structured matrix
    beside it, both as the forward sees them. Collective."""
    names = [f"blocks.{block}.{linear}" for block in range(engine.config.model.num_layers) for linear in LINEARS]
    distances = torch.zeros(len(names), device=engine.device)
    for path, module in engine.module.named_modules():
        if isinstance(module, MLP) and module.fc1_guide is not None:
            block = engine.canonical_name(path).removesuffix(".mlp")
            for linear in LINEARS:
                index = names.index(f"{block}.{linear}")
                distances[index] = _distance(engine, getattr(module, linear), getattr(module, f"{linear}_guide"))
    dist.all_reduce(distances, op=dist.ReduceOp.MAX)  # every stage knows its own
    return {name: value for name, value in zip(names, distances.tolist(), strict=True) if value > 0.0}


def _distance(engine: Engine, structured: nn.Module, guide: nn.Module) -> Tensor:
    parameters = [structured.v, structured.u, guide.weight]
    zero3 = engine.config.parallel.zero_stage == 3
    with deepspeed.zero.GatheredParameters(parameters) if zero3 else contextlib.nullcontext():
        v, u, w = (_whole(parameter, engine.tp).float() for parameter in parameters)
    return (w - structured.unsharded().ops.to_dense(v, u)).norm() / w.norm()


def _whole(parameter: nn.Parameter, tp: TensorGroup) -> Tensor:
    """The global parameter from the group's parts. Collective over the group."""
    own, spec = parameter.detach().contiguous(), getattr(parameter, "shard_spec", None)
    if spec is None:
        return own.clone()
    parts = [torch.empty_like(own) for _ in range(tp.size)]
    dist.all_gather(parts, own, group=tp.group)
    return spec.unshard(parts)
