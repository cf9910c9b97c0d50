"""The end of the guided phase, which frees the guides' memory, and the distance of structured linears from guides."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megastruct.checkpoint.agreement import from_first_rank
from megastruct.checkpoint.store import checkpoint_folder
from megastruct.engine.engine import Engine
from megastruct.files import write_atomically
from megastruct.metrics.devices import current_memory_bytes
from megastruct.models.guidance import LINEARS
from megastruct.models.mlp import MLP
from megastruct.run.checkpoints import Checkpoints, load_checkpoint
from megastruct.structures.sharded import ShardedLinear

REPORT_FILE = "end_of_guided_phase.json"


def end_guided_phase(
    engine: Engine, checkpoints: Checkpoints, step: int, cursor: np.ndarray, state: dict[str, Any]
) -> Engine:
    """Return an engine without guides. Collective.

    The guides' weights, gradients, fp32 masters and optimizer state are freed on every rank; the state of the factors
    does not change. This is a normal resume: a checkpoint of this step, which does not store the guides, is loaded into
    an engine without them. So a run that is killed here and resumed trains the same. The memory of every rank before
    and after, in bytes, is written to REPORT_FILE in the run folder.
    """
    before = current_memory_bytes(engine.device)
    folder = checkpoint_folder(checkpoints.root, step)
    checkpoints.finish_save()
    if not from_first_rank(folder.is_dir()):
        checkpoints.save(engine, step, cursor, state)
    engine = engine.without_guides()
    load_checkpoint(engine, folder)
    gc.collect()
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()
    _report(engine, checkpoints.folder.path / REPORT_FILE, step, before, current_memory_bytes(engine.device))
    return engine


def _report(engine: Engine, path: Path, step: int, before_bytes: int, after_bytes: int) -> None:
    own = torch.tensor([before_bytes, after_bytes], device=engine.device)
    ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, own)
    if dist.get_rank() == 0:
        memory = [{"before_bytes": int(rank[0]), "after_bytes": int(rank[1])} for rank in ranks]
        write_atomically(path, json.dumps({"step": step, "ranks": memory}, indent=1))


@torch.no_grad()
def guide_distances(engine: Engine) -> dict[str, float]:
    """The distance |W - S| / |W| (Frobenius norm) of every guided linear, by name. Collective.

    W is the guide and S the structured matrix, both as the forward sees them. The distance is 0 at the start.
    """
    names = [f"blocks.{block}.{linear}" for block in range(engine.config.model.num_layers) for linear in LINEARS]
    distances = torch.zeros(len(names), device=engine.device)
    for path, module in engine.module.named_modules():
        if isinstance(module, MLP) and module.fc1_guide is not None:
            block = engine.canonical_name(path).removesuffix(".mlp")
            for linear in LINEARS:
                index = names.index(f"{block}.{linear}")
                distances[index] = _distance(engine, getattr(module, linear), getattr(module, f"{linear}_guide"))
    dist.all_reduce(distances, op=dist.ReduceOp.MAX)  # every stage knows only its own distances
    return {name: value for name, value in zip(names, distances.tolist(), strict=True) if value > 0.0}


def _distance(engine: Engine, structured: ShardedLinear, guide: ShardedLinear) -> Tensor:
    with engine.gathered([*structured.factors(), *guide.factors()]):
        s, w = structured.to_dense(), guide.to_dense()
    return (w - s).norm() / w.norm()
