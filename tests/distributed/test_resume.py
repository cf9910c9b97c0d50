"""Checkpoints through real ranks: the same layout goes on bit for bit, another one within the layout's bound."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import tiny_config
from megastruct.checkpoint.store import SafeFileSystemReader, latest_checkpoint, load_tensors
from megastruct.config.load import dump_config
from megastruct.config.schema import Config
from megastruct.errors import UserError
from megastruct.inference.load import load_model
from megastruct.models.gpt import build_gpt
from megastruct.models.loss import cross_entropy
from megastruct.parallel.topology import Topology
from ranks import run_ranks
from runs import batches, evaluate_resumed, resume_half_way, save_half_way


def config_for(folder: Path, precision: str, pp: int, zero: int) -> Config:
    return tiny_config(
        run={"folder": str(folder)}, training={"precision": precision}, parallel={"pp": pp, "zero_stage": zero}
    )


LAYOUTS = [("fp32", 1, 1, 0), ("fp32", 2, 2, 0), ("fp32", 2, 2, 1), ("bf16", 1, 1, 1), ("bf16", 2, 2, 1)]
LAYOUTS += [("fp32", 1, 2, 2), ("bf16", 1, 2, 2), ("fp32", 1, 2, 3), ("bf16", 1, 2, 3)]


@pytest.mark.parametrize(("precision", "pp", "dp", "zero"), LAYOUTS)
def test_same_layout_is_bit_equal(tmp_path: Path, precision: str, pp: int, dp: int, zero: int) -> None:
    config, topology = config_for(tmp_path, precision, pp, zero), Topology(pp, dp)
    undisturbed = run_ranks(pp * dp, save_half_way, config, topology, tmp_path)[0]
    resumed = run_ranks(pp * dp, resume_half_way, config, topology)
    assert all(result == undisturbed[10:] for result in resumed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(4, save_half_way, config_for(folder, "fp32", 2, 1), Topology(2, 2), folder)[0]


@pytest.mark.parametrize(("pp", "dp", "zero"), [(1, 1, 1), (4, 1, 0), (1, 2, 2), (1, 2, 3)])
def test_another_layout_goes_on(saved: tuple[Path, list[Any]], pp: int, dp: int, zero: int) -> None:
    folder, undisturbed = saved
    resumed = run_ranks(pp * dp, resume_half_way, config_for(folder, "fp32", pp, zero), Topology(pp, dp))[0]
    assert max(abs(a[0] - b[0]) for a, b in zip(resumed, undisturbed[10:], strict=True)) <= 1e-6


def test_one_process_loads_the_model(saved: tuple[Path, list[Any]]) -> None:
    folder, _ = saved
    config = config_for(folder, "fp32", 1, 1)
    (folder / "tiny" / "config.yaml").write_text(dump_config(config))
    model, _ = load_model(folder / "tiny")
    batch = next(batches(config, Topology(1, 1), first_step=10))  # what the resumed run trains on next
    with torch.no_grad():
        loaded = cross_entropy(model(batch.ids), batch.labels)
        fresh = cross_entropy(build_gpt(config)(batch.ids), batch.labels)
    (evaluated,) = run_ranks(1, evaluate_resumed, config, Topology(1, 1))
    assert abs(float(loaded) - evaluated) <= 1e-6
    assert abs(float(fresh) - evaluated) > 1e-3


def test_a_checkpoint_of_another_model_is_refused(saved: tuple[Path, list[Any]]) -> None:
    latest = latest_checkpoint(saved[0] / "tiny" / "checkpoints")
    assert latest is not None
    with pytest.raises(UserError, match=r"of shape \[64, 16\], the model wants \[64, 32\]"):
        load_tensors(latest, {"master.embedding.weight": torch.empty(64, 32)})
    with pytest.raises(UserError, match="missing"):
        load_tensors(latest, {"master.blocks.9.mlp.fc1.u": torch.empty(1)})


def test_incomplete_folders_are_not_seen(saved: tuple[Path, list[Any]]) -> None:
    root = saved[0] / "tiny" / "checkpoints"
    (root / ".step_00000099.writing").mkdir()
    latest = latest_checkpoint(root)
    assert latest is not None and latest.name == "step_00000010"
    assert json.loads((latest / "state.json").read_text())["step"] == 10


class _Malicious:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code from a checkpoint was executed')",))


def test_metadata_cannot_execute_code(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Malicious()))
    with pytest.raises(pickle.UnpicklingError, match="has no place in checkpoint metadata"):
        SafeFileSystemReader(tmp_path).read_metadata()
    with pytest.raises(UserError, match="no readable checkpoint"):
        load_tensors(tmp_path, {})
