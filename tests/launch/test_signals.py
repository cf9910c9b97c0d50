"""A stop file from before a process began is old; one that is made while it starts is a request."""

from __future__ import annotations

import os
import time
from pathlib import Path

from megastruct.launch.signals import StopRequest


def test_only_an_old_stop_file_is_removed(tmp_path: Path) -> None:
    file, request = tmp_path / "stop", object.__new__(StopRequest)  # without its signal handlers
    file.touch()
    request.watch(file)
    assert file.exists()
    os.utime(file, (time.time() - 10**6,) * 2)
    request.watch(file)
    assert not file.exists()
