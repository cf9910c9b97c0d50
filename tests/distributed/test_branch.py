"""What a branch takes over of its parent's checkpoint, on every kind of engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs import tiny_config
from marks import always
from megastruct.checkpoint.reading import SafeFileSystemReader
from megastruct.checkpoint.store import checkpoint_folder, load_state, load_tensors
from megastruct.config.load import dump_config
from megastruct.config.schema import Config
from megastruct.engine.engine import build_engine
from megastruct.optimizers import OPTIMIZERS
from megastruct.parallel.topology import Topology
from megastruct.run.branch import branch
from megastruct.run.checkpoints import Checkpoints
from megastruct.run.find import parse_address
from megastruct.run.origin import origin
from megastruct.run.run_folder import RunFolder
from megastruct.structures import STRUCTURES
from ranks import own_device, run_ranks
from runs import save_half_way

SIZES = {"rank": 8, "nblocks": 2}


def config_of(folder: Path, name: str, **sections: Any) -> Config:
    run = {"folder": str(folder), "name": name, **sections.pop("run", {})}
    return tiny_config(run=run, ffn={"structure": "blockdense", **SIZES}, **sections)


def begin(config: Config, topology: Topology) -> None:
    checkpoints = Checkpoints(RunFolder(config))
    checkpoints.newest()
    branch(build_engine(config, topology, own_device(), drawn=False), checkpoints)
    checkpoints.finish_save()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    stored = SafeFileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.full(record.size, torch.nan) for name, record in stored.items()}
    load_tensors(folder, tensors)
    return tensors


@pytest.fixture(scope="module")
def parent(tmp_path_factory: Any) -> Path:
    """A run of one rank, without guides, whose step 10 is saved."""
    folder = tmp_path_factory.mktemp("parent")
    config = config_of(folder, "parent")
    run_ranks(1, save_half_way, config, Topology(1, 1), folder)
    (folder / "parent" / "config.yaml").write_text(dump_config(config))
    return folder / "parent"


LAYOUTS = [(2, 1, 2, 1, "fp32"), (1, 2, 2, 3, "fp32"), (1, 1, 2, 2, "bf16"), (2, 2, 1, 0, "fp32"), (2, 2, 2, 1, "bf16")]
CASES = [(inherit, *layout) for inherit in ("weights", "optimizer") for layout in LAYOUTS]


@pytest.mark.parametrize(
    ("inherit", "pp", "tp", "dp", "zero", "precision"),
    always(CASES, [("weights", 2, 1, 2, 1, "fp32"), ("optimizer", 1, 2, 2, 3, "fp32")]),
)
def test_weights_are_taken_over_and_guides_begin_as_what_they_guide(
    parent: Path, tmp_path: Path, inherit: str, pp: int, tp: int, dp: int, zero: int, precision: str
) -> None:
    """The masters are equal bit for bit; the optimizer's state is, too, or is zero."""
    config = config_of(
        tmp_path,
        "branch",
        run={"from": f"{parent}@10", "inherit": inherit},
        guided={"schedule": "fixedstep", "levels": 4},
        training={"precision": precision},
        parallel={"pp": pp, "tp": tp, "zero_stage": zero},
    )
    (tmp_path / "branch").mkdir()
    run_ranks(pp * tp * dp, begin, config, Topology(pp, dp, tp))
    before = tensors_of(checkpoint_folder(parent / "checkpoints", 10))
    after = tensors_of(checkpoint_folder(tmp_path / "branch" / "checkpoints", 0))
    guides = {name for name in after if "_guide." in name}
    assert after.keys() - guides == before.keys()
    assert len(guides) == 3 * 2 * 3  # three structured blocks, two linears, a master and two moments
    for name, tensor in before.items():
        taken = name.startswith("master.") or inherit == "optimizer"
        assert torch.equal(after[name], tensor if taken else torch.zeros_like(tensor)), name
    structure = STRUCTURES["blockdense"]
    for name in guides:
        if not name.startswith("master."):
            assert not after[name].any(), name
            continue
        linear, (m, n) = name.removesuffix("_guide.weight"), after[name].shape
        factors = [before[f"{linear}.{factor}"] for factor in structure.numbers.factor_shapes(n, m, SIZES)]
        dense = structure.layers.maths.to_dense(*factors)
        bound = 1e-6 if precision == "fp32" else 2e-2  # of the factors as the forward sees them
        assert dense.norm() > 1 and (after[name] - dense).norm() <= bound * dense.norm(), name


SWITCHES = [(LAYOUTS[1], LAYOUTS[0]), (LAYOUTS[0], LAYOUTS[2]), (LAYOUTS[3], LAYOUTS[4]), (LAYOUTS[4], LAYOUTS[1])]


@pytest.mark.parametrize(("first", "second"), always(SWITCHES, [SWITCHES[0]]))
def test_another_optimizer_and_back(parent: Path, tmp_path: Path, first: Any, second: Any) -> None:
    """AdamW, Muon, AdamW: the masters go on bit for bit; the state is that of the new optimizer, and zero."""
    before, stored = parent, tensors_of(checkpoint_folder(parent / "checkpoints", 10))
    masters = {name: tensor for name, tensor in stored.items() if name.startswith("master.")}
    address = f"{parent}@10"
    for kind, (pp, tp, dp, zero, precision) in (("muon", first), ("adamw", second)):
        config = config_of(
            tmp_path,
            kind,
            run={"from": address, "inherit": "data"},
            training={"precision": precision},
            parallel={"pp": pp, "tp": tp, "zero_stage": zero},
            optimizer={"kind": kind},
        )
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.yaml").write_text(dump_config(config))
        run_ranks(pp * tp * dp, begin, config, Topology(pp, dp, tp))
        found = tensors_of(checkpoint := checkpoint_folder(tmp_path / kind / "checkpoints", 0))
        for name, tensor in masters.items():
            assert torch.equal(found[name], tensor), name
        kinds = {name.partition(".")[0] for name in found} - {"master"}
        assert kinds == set(OPTIMIZERS[kind].state)
        assert not any(tensor.any() for name, tensor in found.items() if not name.startswith("master."))
        state = load_state(checkpoint)
        assert (state["optimizer"], state["earlier_optimizer_steps"], state["sample"]) == (kind, 0, 10 * 16)
        record = origin(tmp_path / kind) or {}
        assert (record["folder"], record["optimizer"]) == (str(before), "adamw" if kind == "muon" else "muon")
        before, address = tmp_path / kind, str(checkpoint)


def test_addresses(parent: Path) -> None:
    checkpoint = parent / "checkpoints" / "step_00000010"
    assert parse_address(str(parent), "run.from") == (parent, None)
    assert (
        parse_address(f"{parent}@10", "run.from") == parse_address(str(checkpoint), "run.from") == (parent, checkpoint)
    )
