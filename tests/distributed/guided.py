"""What ranks run in tests of self-guided training."""

from __future__ import annotations

import gc
import json
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from configs import tiny_config
from megastruct.config.schema import Config
from megastruct.engine.engine import Engine, build_engine
from megastruct.models.guidance import is_guide
from megastruct.parallel.topology import Topology
from megastruct.planning.steps import data_step, guided_steps, total_steps
from megastruct.run.checkpoints import Checkpoints, load_checkpoint
from megastruct.run.guided_phase import REPORT_FILE, end_guided_phase
from megastruct.run.run_folder import RunFolder
from megastruct.run.schedules import alpha
from ranks import own_device
from runs import batches

STRUCTURES: dict[str, dict[str, Any]] = {
    "lowrank": {"structure": "lowrank", "rank": 8},
    "blockdense": {"structure": "blockdense", "rank": 8, "nblocks": 2},
    "blockshuffle": {"structure": "blockshuffle", "rank": None, "nblocks": 2},
}


def guided_config(topology: Topology, zero: int = 1, structure: str = "lowrank", **sections: Any) -> Config:
    """20 steps, guided for the first 10."""
    sections["guided"] = {"schedule": "fixedstep", "levels": 2, **sections.get("guided", {})}
    sections["training"] = {"global_batch_size": 8, **sections.get("training", {})}
    sections["optimizer"] = {"eps": 1e-5, **sections.get("optimizer", {})}
    parallel = {"pp": topology.pp_size, "tp": topology.tp_size, "zero_stage": zero}
    return tiny_config(parallel=parallel, ffn=STRUCTURES[structure], **sections)


Results = list[tuple[float, float]]


def steps(engine: Engine, first: int, last: int, keep_guides: bool = False) -> tuple[Engine, Results]:
    """Train the steps in [first, last) as the loop does; the guides leave at their end unless they are kept."""
    config, results = engine.config, []
    iterator = None
    for step in range(first, last):
        if engine.guidance and step >= guided_steps(config) and not keep_guides:
            checkpoints = Checkpoints(RunFolder(config))
            engine = end_guided_phase(engine, checkpoints, step, np.array([[step]]), {})
        if engine.reads_data and (iterator is None or step == config.training.base_steps):
            iterator = batches(config, engine.topology, data_step(config, step))
        engine.set_learning_rate(1e-2 * (1 - step / 40))
        engine.set_alpha(alpha(config, step), step)
        results.append((engine.train_batch(iterator), engine.gradient_norm()))
    return engine, results


def whole_run(config: Config, topology: Topology, keep_guides: bool = False) -> Results:
    """All steps, from the newest checkpoint on if there is one."""
    folder = RunFolder(config)
    checkpoint = Checkpoints(folder).newest()
    engine = build_engine(config, topology, own_device(), folder.finished_steps())
    step, _, _ = load_checkpoint(engine, checkpoint)
    return steps(engine, step, total_steps(config), keep_guides)[1]


def first_losses(config: Config, topology: Topology) -> list[float]:
    """Before any training, the loss at several alphas."""
    engine = build_engine(config, topology, own_device())
    held_out = [next(batches(config, topology))]
    return [engine.evaluate(held_out, 1, alpha) for alpha in (0.0, 0.3, 1.0)]


def interrupted_run(config: Config, topology: Topology, last: int) -> Results:
    """The first steps, then a checkpoint."""
    engine = build_engine(config, topology, own_device())
    engine, results = steps(engine, 0, last)
    Checkpoints(RunFolder(config)).save(engine, last, np.array([[last]]), {})
    return results


def live_bytes() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    # Tracers and compilers leave fake ones in this process, and in those that are forked from it.
    tensors = [each for each in gc.get_objects() if torch.is_tensor(each) and not isinstance(each, FakeTensor)]
    tensors += [each.grad for each in tensors if each.is_leaf and each.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def memory_of_the_end(config: Config, topology: Topology) -> tuple[int, int, int, dict[str, Any]]:
    """(guide parameters on this rank's stage, live bytes before the end of the guided phase, after it, the report)."""
    border = guided_steps(config)
    run: list[Engine] = [steps(build_engine(config, topology, own_device()), 0, border)[0]]  # as the loop holds it
    guides = sum(getattr(p, "ds_numel", p.numel()) for name, p in run[0].named_parameters() if is_guide(name))
    # Saved before it is measured: the copies in host memory, which are kept for the next save, are in both numbers.
    checkpoints = Checkpoints(RunFolder(config))
    checkpoints.save(run[0], border, np.array([[border]]), {})
    before = live_bytes()
    given_up = run[0]  # as the loop still holds it when the guides' memory is reported
    run[0] = end_guided_phase(run[0], checkpoints, border, np.array([[border]]), {})
    after = live_bytes()
    del given_up
    assert not any(is_guide(name) for name, _ in run[0].named_parameters())
    return guides, before, after, json.loads((checkpoints.folder.path / REPORT_FILE).read_text())
