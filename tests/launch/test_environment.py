"""What a process takes from its environment: its share of the cores, the start of its command, a place for caches."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from megastruct.launch.environment import (
    began,
    keep_compiled_code,
    reserved_port,
    seconds_since_start,
    take_share_of_cores,
)


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 32),
        ({"LOCAL_SIZE": "8"}, 4),
        ({"LOCAL_WORLD_SIZE": "8"}, 4),
        ({"LOCAL_SIZE": "64"}, 1),
        ({"LOCAL_SIZE": "8", "OMP_NUM_THREADS": "3"}, 3),
        ({"LOCAL_SIZE": "8", "OMP_NUM_THREADS": "many"}, 4),
    ],
)
def test_a_process_takes_its_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)), raising=False)
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert take_share_of_cores() == threads
    assert os.environ["OMP_NUM_THREADS"] == str(threads)


def test_a_rank_counts_from_the_start_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert float(began()["MEGASTRUCT_BEGAN"]) == psutil.Process().create_time()
    monkeypatch.setenv("MEGASTRUCT_BEGAN", str(time.time() - 1e6))
    assert 1e6 <= seconds_since_start() < 1e6 + 60
    monkeypatch.delenv("MEGASTRUCT_BEGAN")
    own = time.time() - psutil.Process().create_time()
    assert own <= seconds_since_start() < own + 60
    monkeypatch.setenv("MEGASTRUCT_BEGAN", str(time.time() + 1e6))  # another machine, whose clock is ahead
    assert own <= seconds_since_start() < own + 60


def test_compiled_code_is_kept_where_the_config_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "set")
    keep_compiled_code(str(tmp_path / "a"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "set" and not list(tmp_path.iterdir())
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").touch()
    keep_compiled_code(str(tmp_path / "file" / "folder"))
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert "warning: hardware.compile_cache: " in capsys.readouterr().err
    keep_compiled_code(None)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "megastruct" / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled_code(str(tmp_path / "a"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "a") and (tmp_path / "a").is_dir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")


def test_a_reserved_port_is_for_rank_0_alone() -> None:
    """Rank 0 can listen on it; whoever wants it otherwise is refused."""
    with reserved_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        store = dist.TCPStore("127.0.0.1", port, 1, is_master=True, wait_for_workers=False)
        store.set("key", "value")
        assert store.get("key") == b"value"
