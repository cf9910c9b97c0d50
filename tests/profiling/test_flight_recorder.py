"""The environment in which PyTorch sets up its flight recorder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megastruct.config.system import ProfilingConfig
from megastruct.profiling.flight_recorder import FlightRecorder, recorded_collectives

NAMES = (
    "TORCH_FR_BUFFER_SIZE",
    "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
    "TORCH_NCCL_DUMP_ON_TIMEOUT",
)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_old_and_new_names_are_set_and_a_users_own_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "5")
    FlightRecorder(ProfilingConfig(flight_recorder_entries=2000), tmp_path, 3)
    prefix = str(tmp_path / "profile" / "collectives_rank_")
    assert [os.environ[name] for name in NAMES] == ["5", "2000", prefix, prefix, "1"]
    assert (tmp_path / "profile").is_dir()


def test_off_it_touches_nothing(tmp_path: Path) -> None:
    FlightRecorder(ProfilingConfig(), tmp_path, 0).dump()
    assert not any(name in os.environ for name in NAMES) and list(tmp_path.iterdir()) == []
    assert recorded_collectives() == b""  # without a process group


@pytest.mark.parametrize("names", [NAMES[:2], NAMES[2:4], NAMES[4:]], ids=lambda names: names[0])
def test_pytorch_reads_one_of_the_names(names: tuple[str, ...]) -> None:
    """They are in its header files or its library."""
    import torch

    folder = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "distributed" / "c10d"
    places = [*folder.glob("*.hpp"), *(Path(torch.__file__).parent / "lib").glob("libtorch_c*.so")]
    contents = (path.read_bytes() for path in places)  # libraries are large: they are read last
    assert any(name.encode() in content for content in contents for name in names)
