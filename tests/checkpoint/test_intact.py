"""Damaged checkpoints: found by every rank, passed over together, never loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megastruct.checkpoint import intact, store
from megastruct.checkpoint.checksums import MANIFEST_FILE, checksum_of, manifest_text, read_manifest
from megastruct.checkpoint.intact import newest_intact, newest_of_right_size, set_aside
from megastruct.checkpoint.sharded import ShardedTensor
from megastruct.checkpoint.store import load_tensors, save_checkpoint
from megastruct.errors import UserError
from megastruct.parallel.shards import Box
from ranks import run_ranks

ROWS = 1000


def save_three(root: Path) -> None:
    """Steps 1 to 3; every rank has an equal number of rows, which are the step."""
    rank, size = dist.get_rank(), dist.get_world_size()
    length = ROWS // size
    for step in (1, 2, 3):
        rows = torch.full((length * 4,), float(step))
        box = Box((0, 0), (0, 0), (ROWS, 4))
        tensors: dict[str, Any] = {
            "weight": ShardedTensor.of_fragment(rows, rank * length * 4, (ROWS, 4), (ROWS, 4), [box])
        }
        save_checkpoint(root, step, tensors, {"step": step}, keep=3)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    run_ranks(2, save_three, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def choose(root: Path) -> tuple[str, list[str]]:
    """(folder that is chosen, or the error; names of the files that this rank has read)."""
    read: list[str] = []
    content_problem = intact.content_problem

    def counted(path: Path, wanted: Any) -> str:
        read.append(f"{path.parent.name}/{path.name}")
        return content_problem(path, wanted)

    intact.content_problem = counted
    try:
        folder, damaged = newest_intact(root)
        set_aside(damaged)
    except UserError as error:
        assert error.on_all_ranks
        return str(error), read
    finally:
        intact.content_problem = content_problem
    return folder.name if folder else "", read


def agreed(root: Path, world_size: int = 2) -> str:
    results = run_ranks(world_size, choose, root)
    assert len({chosen for chosen, _ in results}) == 1, "ranks disagree"
    return results[0][0]


def cut_off(folder: Path) -> None:
    os.truncate(folder / "__1_0.distcp", (folder / "__1_0.distcp").stat().st_size // 2)


def flip_a_bit(folder: Path) -> None:
    file = folder / "__1_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def remove_a_file(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()


def add_a_file(folder: Path) -> None:
    (folder / "__2_0.distcp").write_bytes(b"")


def change_the_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes() + b".")


def change_the_state(folder: Path) -> None:
    (folder / "state.json").write_text('{"step": 2}')


def empty_the_manifest(folder: Path) -> None:
    (folder / "checksums.json").write_text("{}")


def cut_the_manifest_off(folder: Path) -> None:
    os.truncate(folder / "checksums.json", 100)


def no_values_in_the_manifest(folder: Path) -> None:
    (folder / "checksums.json").write_text('{".metadata": 3}')


DAMAGES = [cut_off, flip_a_bit, remove_a_file, add_a_file, change_the_metadata, change_the_state]
DAMAGES += [empty_the_manifest, cut_the_manifest_off, no_values_in_the_manifest]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda function: function.__name__)
def test_the_checkpoint_before_is_used(root: Path, damage: Callable[[Path], None]) -> None:
    assert agreed(root) == "step_00000003"
    damage(root / "step_00000003")
    assert agreed(root) == "step_00000002"
    assert sorted(path.name for path in root.iterdir()) == ["step_00000001", "step_00000002", "step_00000003.damaged"]
    weight = torch.empty(ROWS, 4)
    load_tensors(root / "step_00000002", {"weight": weight})
    assert bool((weight == 2).all())


def test_two_in_a_row_and_what_is_said(root: Path, capfd: Any) -> None:
    cut_off(root / "step_00000003")
    flip_a_bit(root / "step_00000002")
    folder, damaged = newest_intact(root)  # alone, without a process group
    set_aside(damaged)
    assert folder == root / "step_00000001"
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.startswith("warning: ") for line in said)
    assert "step_00000003: damaged: __1_0.distcp has" in said[0] and "going back to step_00000001" in said[0]
    assert "step_00000002: damaged: __1_0.distcp has changed since it was written (another checksum)" in said[1]


def test_none_is_left(root: Path) -> None:
    for folder in list(root.iterdir()):
        flip_a_bit(folder)
    found = agreed(root)
    assert "every checkpoint is damaged" in found and all(f"step_0000000{step}: damaged" in found for step in (1, 2, 3))
    assert len(list(root.glob("step_0000000?"))) == 3, "a start from nothing would look like the first one"


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert newest_intact(tmp_path / "none") == (None, [])


def test_every_file_is_read_once_by_one_rank(root: Path) -> None:
    by_rank = [read for _, read in run_ranks(2, choose, root)]
    files = [f"step_00000003/{path.name}" for path in (root / "step_00000003").iterdir()]
    assert sorted(by_rank[0] + by_rank[1]) == sorted(set(files) - {"step_00000003/checksums.json"})
    assert by_rank[0] and by_rank[1]


def test_the_manifest_has_what_is_on_the_disk(root: Path) -> None:
    folder = root / "step_00000003"
    manifest = read_manifest(folder)
    assert set(manifest) == {".metadata", "__0_0.distcp", "__1_0.distcp", "state.json"}
    assert all(checksum_of(folder / name) == wanted for name, wanted in manifest.items())


def test_what_can_be_seen_without_reading(root: Path) -> None:
    flip_a_bit(root / "step_00000003")
    assert newest_of_right_size(root) == root / "step_00000003"
    cut_off(root / "step_00000003")
    assert newest_of_right_size(root) == root / "step_00000002"


def test_a_folder_that_is_set_aside_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 renames a damaged one while another rank still looks for the newest."""
    for step in (2, 3):
        folder = tmp_path / f"step_{step:08d}"
        folder.mkdir()
        (folder / MANIFEST_FILE).write_text(manifest_text({}))

    def renamed_then(folder: Path) -> Any:
        manifest = read_manifest(folder)
        if folder.name.endswith("3"):
            set_aside([folder])
        return manifest

    monkeypatch.setattr(intact, "read_manifest", renamed_then)
    assert newest_of_right_size(tmp_path) == tmp_path / "step_00000002"


def test_the_checkpoint_before_comes_back_where_its_successor_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, aside, replace = tmp_path / "step_00000003", tmp_path / ".step_00000003.writing", os.replace
    for folder in (final, aside):
        folder.mkdir()
    (final / "mark").touch()

    def refuse(source: Path, target: Path) -> None:
        if Path(source) == aside:
            raise OSError("refused")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="refused"):
        store._publish(aside, final, {}, {}, keep=1)
    assert (final / "mark").exists()
