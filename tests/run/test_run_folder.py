"""Who may use a run folder at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import tiny_config
from megastruct.errors import UserError
from megastruct.run.run_folder import RunFolder


def test_ranks_that_check_do_not_refuse_each_other_and_the_one_that_trains_does(tmp_path: Path) -> None:
    """A lock belongs to the opened file: two of one process meet as those of two processes do."""
    folder = RunFolder(tiny_config(run={"folder": str(tmp_path)}))
    with folder.lock(shared=True):
        folder.check({})
    with folder.lock():
        with pytest.raises(UserError, match="another process trains in"):
            folder.check({})
        with pytest.raises(UserError, match="another process trains in"):
            folder.lock()
    folder.check({})
