"""Nothing that is loaded executes code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megastruct.checkpoint.reading import SafeFileSystemReader, TensorLoadPlanner
from megastruct.checkpoint.store import load_state, load_tensors
from megastruct.errors import UserError

NAME = "master.weight"


class Malicious:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def test_metadata_cannot_execute_code(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Malicious(marker)))
    with pytest.raises(pickle.UnpicklingError, match="is not allowed in checkpoint metadata"):
        SafeFileSystemReader(tmp_path).read_metadata()
    with pytest.raises(UserError, match="cannot be read"):
        load_tensors(tmp_path, {})
    assert not marker.exists()
    pickle.loads((tmp_path / ".metadata").read_bytes())  # noqa: S301 - our own
    assert marker.exists(), "the attack does not work anyhow"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("with_a_size", [False, True])
def test_a_value_that_is_no_tensor_is_not_unpickled(tmp_path: Path, with_a_size: bool) -> None:
    """DCP unpickles what its metadata call bytes, with all that this allows; also where they claim a size, too."""
    marker = tmp_path / "executed"
    folder = tmp_path / "checkpoint"
    dcp.save({NAME: Malicious(marker)}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    metadata = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 - our own
    assert isinstance(metadata.state_dict_metadata[NAME], BytesStorageMetadata)
    if with_a_size:
        metadata.state_dict_metadata[NAME].__dict__["size"] = torch.Size((2,))
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError):
        load_tensors(folder, {NAME: torch.empty(2)})
    planner = TensorLoadPlanner()
    with pytest.raises(CheckpointException, match="is not a tensor"):  # also by itself, behind DCP's own reader
        dcp.load({NAME: torch.empty(2)}, storage_reader=dcp.FileSystemReader(folder), planner=planner, no_dist=True)
    assert not marker.exists()
    dcp.load({NAME: torch.empty(2)}, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    assert marker.exists(), "the attack does not work anyhow"


def test_names_of_metadata_that_are_refused(tmp_path: Path) -> None:
    for module, name in (
        ("torch", "load"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("builtins", "eval"),
    ):
        (tmp_path / ".metadata").write_bytes(f"c{module}\n{name}\n.".encode())
        with pytest.raises(pickle.UnpicklingError, match="is not allowed"):
            SafeFileSystemReader(tmp_path).read_metadata()


def test_state_is_plain_values(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"step": 3}))
    assert load_state(tmp_path) == {"step": 3}
    (tmp_path / "state.json").write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
    with pytest.raises(UserError, match="cannot be read"):
        load_state(tmp_path)
    assert not (tmp_path / "executed").exists()
