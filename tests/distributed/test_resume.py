"""Checkpoints through real ranks: the same layout goes on bit for bit, another one within the layout's bound."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from bounds import within
from configs import tiny_config
from marks import always, soak
from megastruct.checkpoint.reading import SafeFileSystemReader
from megastruct.checkpoint.store import latest_checkpoint, load_tensors, save_checkpoint
from megastruct.config.load import dump_config
from megastruct.config.schema import Config
from megastruct.engine.engine import build_engine
from megastruct.errors import UserError
from megastruct.inference.load import load_model
from megastruct.models.gpt import GPT
from megastruct.models.loss import cross_entropy
from megastruct.parallel.topology import Topology
from megastruct.run.agreement import check_same_data
from megastruct.run.checkpoints import Checkpoints, load_checkpoint
from megastruct.run.run_folder import RunFolder
from ranks import own_device, run_ranks
from runs import batches, evaluate_resumed, resume_and_save_again, resume_half_way, save_half_way


def config_for(folder: Path, precision: str, pp: int, zero: int) -> Config:
    return tiny_config(
        run={"folder": str(folder)}, training={"precision": precision}, parallel={"pp": pp, "zero_stage": zero}
    )


LAYOUTS = [("fp32", 1, 1, 0), ("fp32", 2, 2, 0), ("fp32", 2, 2, 1), ("bf16", 1, 1, 1), ("bf16", 2, 2, 1)]
LAYOUTS += [("fp32", 1, 2, 2), ("bf16", 1, 2, 2), ("fp32", 1, 2, 3), ("bf16", 1, 2, 3)]


@pytest.mark.parametrize(
    ("precision", "pp", "dp", "zero"),
    always(LAYOUTS, [("fp32", 2, 2, 0)]),
)
def test_same_layout_is_bit_equal(tmp_path: Path, precision: str, pp: int, dp: int, zero: int) -> None:
    config, topology = config_for(tmp_path, precision, pp, zero), Topology(pp, dp)
    undisturbed = run_ranks(pp * dp, save_half_way, config, topology, tmp_path)[0]
    resumed = run_ranks(pp * dp, resume_half_way, config, topology)
    assert all(result == undisturbed[10:] for result in resumed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(4, save_half_way, config_for(folder, "fp32", 2, 1), Topology(2, 2), folder)[0]


@dataclass(frozen=True)
class Layout:
    """A grid, a ZeRO stage and a precision."""

    pp: int
    dp: int
    tp: int
    zero: int
    precision: str = "fp32"

    @property
    def topology(self) -> Topology:
        return Topology(self.pp, self.dp, self.tp)

    def config(self, folder: Path) -> Config:
        """A model whose vocabulary does not divide and whose key/value heads are fewer than the ranks."""
        return tiny_config(
            run={"folder": str(folder)},
            model={"num_key_value_heads": 2, "vocab_size": 61},
            ffn={"structure": "blockdense", "rank": 8, "nblocks": 2},
            training={"precision": self.precision, "global_batch_size": 8},
            optimizer={"eps": 1e-5},
            parallel={"pp": self.pp, "tp": self.tp, "zero_stage": self.zero},
        )

    def __str__(self) -> str:
        return f"pp{self.pp}dp{self.dp}tp{self.tp}zero{self.zero}{self.precision}"


CHANGES = [
    (Layout(2, 2, 1, 1), [Layout(1, 1, 1, 1), Layout(4, 1, 1, 0), Layout(1, 2, 1, 2), Layout(1, 4, 1, 3)]),
    (Layout(1, 2, 2, 3), [Layout(1, 1, 1, 1), Layout(2, 1, 2, 0), Layout(1, 1, 4, 1), Layout(1, 2, 1, 2)]),
    (Layout(2, 2, 1, 0), [Layout(1, 4, 1, 1), Layout(2, 1, 2, 1), Layout(1, 1, 1, 3)]),
    (
        Layout(2, 1, 2, 1, "bf16"),
        [
            Layout(1, 2, 1, 2, "bf16"),
            Layout(1, 4, 1, 3, "bf16"),
            Layout(2, 2, 1, 1, "bf16"),
            Layout(1, 1, 4, 1, "bf16"),
        ],
    ),
]
BOUNDS = {("fp32", False): 1e-6, ("fp32", True): 1e-5, ("bf16", False): 3e-3, ("bf16", True): 3e-2}


@pytest.fixture(scope="module")
def saved_by(tmp_path_factory: Any) -> Callable[[Layout], tuple[Path, list[Any]]]:
    """(run folder, losses of the undisturbed run), made once for each layout."""

    @functools.cache
    def make(before: Layout) -> tuple[Path, list[Any]]:
        folder = tmp_path_factory.mktemp(str(before))
        topology = before.topology
        return folder, run_ranks(topology.world_size, save_half_way, before.config(folder), topology, folder)[0]

    return make


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    metadata = SafeFileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.full(value.size, torch.nan) for name, value in metadata.items()}
    load_tensors(folder, tensors)
    return tensors


@pytest.mark.parametrize(
    ("before", "after"),
    always(
        [(before, after) for before, afters in CHANGES for after in afters],
        [(before, afters[0]) for before, afters in CHANGES[-2:]],
    ),
    ids=str,
)
def test_another_layout_has_the_same_state_and_goes_on(
    saved_by: Any, tmp_path: Path, before: Layout, after: Layout
) -> None:
    """The state is bit-equal: what the new layout saves at once is what it loaded. Losses are within the bound."""
    folder, undisturbed = saved_by(before)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    topology = after.topology
    resumed = run_ranks(topology.world_size, resume_and_save_again, after.config(tmp_path), topology)
    assert all(result == resumed[0] for result in resumed), "ranks disagree"
    bound = BOUNDS[after.precision, before.tp != after.tp]
    assert within(max(abs(a[0] - b[0]) for a, b in zip(resumed[0], undisturbed[10:], strict=True)), bound, "loss")
    checkpoints = tmp_path / "tiny" / "checkpoints"
    first, second = stored(checkpoints / "step_00000010"), stored(checkpoints / "step_00000011")
    assert len(first) > 100 and set(first) == set(second)
    for name, tensor in first.items():
        assert not tensor.isnan().any(), f"{name} is stored in part"
        assert torch.equal(tensor, second[name]), name
    assert all(bool(first[name].any()) for name in first if name.startswith("exp_avg_sq")), "nothing was trained"


@pytest.mark.parametrize("layout", [soak(Layout(1, 2, 2, 3, "bf16")), soak(Layout(2, 2, 2, 1))], ids=str)
def test_the_same_layout_with_tensor_parallelism_is_bit_equal(tmp_path: Path, layout: Layout) -> None:
    config, topology = layout.config(tmp_path), layout.topology
    undisturbed = run_ranks(topology.world_size, save_half_way, config, topology, tmp_path)[0]
    assert run_ranks(topology.world_size, resume_half_way, config, topology)[0] == undisturbed[10:]


def test_one_process_loads_the_model(saved: tuple[Path, list[Any]]) -> None:
    folder, _ = saved
    config = config_for(folder, "fp32", 1, 1)
    (folder / "tiny" / "config.yaml").write_text(dump_config(config))
    model, _ = load_model(folder / "tiny", "cpu")
    batch = next(batches(config, Topology(1, 1), first_step=10))  # what the resumed run trains on next
    with torch.no_grad():
        loaded = cross_entropy(model(batch.ids), batch.labels)
        fresh = cross_entropy(GPT(config)(batch.ids), batch.labels)
    (evaluated,) = run_ranks(1, evaluate_resumed, config, Topology(1, 1))
    assert within(abs(float(loaded) - evaluated), 1e-6, "validation loss")
    assert abs(float(fresh) - evaluated) > 1e-3


def test_a_checkpoint_of_another_model_is_refused(saved: tuple[Path, list[Any]]) -> None:
    latest = latest_checkpoint(saved[0] / "tiny" / "checkpoints")
    assert latest is not None
    with pytest.raises(UserError, match=r"has shape \[64, 16\], but the model needs \[64, 32\]"):
        load_tensors(latest, {"master.embedding.weight": torch.empty(64, 32)})
    with pytest.raises(UserError, match="missing"):
        load_tensors(latest, {"master.blocks.9.mlp.fc1.u": torch.empty(1)})


def load_into_a_deeper_model(config: Config, topology: Topology) -> str:
    """Save a model without the last block; the error of loading that into the whole one."""
    shallow = Config.model_validate({**config.model_dump(), "model": {**config.model.model_dump(), "num_layers": 3}})
    checkpoints = Checkpoints(RunFolder(config))
    checkpoints.save(build_engine(shallow, topology, own_device()), 3, np.array([[3]]), {})
    try:
        load_checkpoint(build_engine(config, topology, own_device()), checkpoints.newest())
    except UserError as error:
        return str(error) if error.on_all_ranks else ""
    return ""


def test_a_checkpoint_with_less_than_the_model_is_refused_on_all_ranks(tmp_path: Path) -> None:
    """Also on those that own nothing of what is missing."""
    errors = run_ranks(2, load_into_a_deeper_model, config_for(tmp_path, "fp32", 2, 1), Topology(2, 1))
    assert errors[0] == errors[1] and "master.blocks.3." in errors[0] and "missing" in errors[0]
    names = set(stored(tmp_path / "tiny" / "checkpoints" / "step_00000003"))
    model = GPT(config_for(tmp_path, "fp32", 1, 1))
    wanted = {f"{kind}.{name}" for kind in ("master", "exp_avg", "exp_avg_sq") for name, _ in model.named_parameters()}
    assert names == {name for name in wanted if ".blocks.3." not in name}


def save_without_a_tensor(folder: Path) -> str:
    rank = dist.get_rank()
    wanted = ["held_0", "held_1", f"no_{rank}"]
    try:
        save_checkpoint(folder, 1, {f"held_{rank}": torch.ones(2)}, {}, keep=1, wanted=wanted)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_checkpoint_that_would_miss_a_tensor_is_not_written(tmp_path: Path) -> None:
    assert (
        run_ranks(2, save_without_a_tensor, tmp_path)
        == ["no rank holds 2 tensors of the checkpoint, among them no_0"] * 2
    )
    assert not list(tmp_path.iterdir())


def test_incomplete_folders_are_not_seen(saved: tuple[Path, list[Any]]) -> None:
    root = saved[0] / "tiny" / "checkpoints"
    (root / ".step_00000099.writing").mkdir()
    latest = latest_checkpoint(root)
    assert latest is not None and latest.name == "step_00000010"
    assert json.loads((latest / "state.json").read_text())["step"] == 10


def compare_data(parts: list[dict[str, int]]) -> str:
    try:
        check_same_data(parts[dist.get_rank()])
    except UserError as error:
        return str(error)
    return ""


def test_ranks_that_see_other_data_are_named() -> None:
    alike, other = {"num_shards": 3, "num_bytes": 70}, {"num_shards": 3, "num_bytes": 71}
    assert run_ranks(2, compare_data, [alike, dict(alike)]) == ["", ""]
    messages = run_ranks(3, compare_data, [alike, alike, other])
    assert messages[0].startswith("data.path: num_bytes is 71 on rank 2 but 70 on rank 0") and len(set(messages)) == 1
