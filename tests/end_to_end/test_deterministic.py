"""The deterministic mode trains on every family of layouts, reaches every rank, and repeats its bits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from forked import Forked, train_forked
from marks import always
from megastruct import train
from megastruct.engine.determinism import make_deterministic
from processes import losses

FAMILIES = {
    "zero0": ["parallel.dp=2", "parallel.zero_stage=0"],
    "zero1": ["parallel.dp=2"],
    "zero2": ["parallel.dp=2", "parallel.zero_stage=2"],
    "zero3": ["parallel.dp=2", "parallel.zero_stage=3"],
    "stages": ["parallel.pp=2"],
    "tensor": ["parallel.tp=2"],
    "tensor zero3": ["parallel.tp=2", "parallel.zero_stage=3"],
    "guided": ["parallel.pp=2", "guided.schedule=fixedflop", "guided.fraction=0.5", "guided.levels=4"],
    "muon": ["parallel.dp=2", "optimizer.kind=muon"],
    "documents": ["parallel.tp=2", "training.document_attention=separate"],
    "bf16": ["parallel.dp=2", "training.precision=bf16"],
    "recomputed": ["parallel.pp=2", "training.activation_checkpointing=true"],
    "compiled": ["parallel.dp=2", "training.compile=true"],
    "z-loss": ["parallel.tp=2", "training.z_loss=1e-4", "model.qk_norm=true"],
    "blockshuffle": ["parallel.tp=2", "ffn.structure=blockshuffle", "ffn.rank=null", "ffn.nblocks=4"],
    "grouped": ["parallel.tp=2", "model.num_key_value_heads=1"],
}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Has every rank write the mode that it trains in, and fills uninitialised memory with NaN: a read of it shows."""
    trained = train.Run.train

    def run(own: train.Run) -> bool:
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        names = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_PROTO")
        mode: list[Any] = [torch.are_deterministic_algorithms_enabled()]
        mode += [torch.is_deterministic_algorithms_warn_only_enabled(), *map(os.environ.get, names)]
        (tmp_path / f"mode.{os.environ['RANK']}").write_text(json.dumps(mode))
        return trained(own)

    monkeypatch.setattr(train.Run, "train", run)
    return tmp_path


@pytest.mark.parametrize("family", always(FAMILIES, ["stages"]))
def test_runs_repeat_and_resume_bit_for_bit(config: Path, settings: Path, family: str) -> None:
    arguments = [config, *FAMILIES[family], "reliability.deterministic=true"]
    runs = settings / "runs"
    train_forked(settings, runs / "test", 2, *arguments)
    for rank in range(2):
        assert json.loads((settings / f"mode.{rank}").read_text()) == [True, False, ":4096:8", "Ring", "Simple"]
    with Forked(settings, runs / "again", 2, *arguments, "run.name=again") as killed:
        killed.wait_for_step(7)
    train_forked(settings, runs / "again", 2, *arguments, "run.name=again")
    assert len(losses(runs / "test")) >= 12
    assert losses(runs / "again") == losses(runs / "test")


def test_what_a_user_has_pinned_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    monkeypatch.setenv("NCCL_PROTO", "LL128")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    try:
        make_deterministic()
        names = ("NCCL_ALGO", "NCCL_PROTO", "CUBLAS_WORKSPACE_CONFIG")
        assert [os.environ[name] for name in names] == ["Tree", "LL128", ":16:8"]
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")  # with it PyTorch would refuse to multiply
        make_deterministic()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
