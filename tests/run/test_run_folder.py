"""Who may use a run folder at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import tiny_config
from megastruct.errors import UserError
from megastruct.run.run_folder import check_run_folder, lock_run_folder


def test_ranks_that_check_do_not_refuse_each_other_and_the_one_that_trains_does(tmp_path: Path) -> None:
    """A lock belongs to the opened file: two of one process meet as those of two processes do."""
    config = tiny_config(run={"folder": str(tmp_path)})
    with lock_run_folder(config, shared=True):
        check_run_folder(config, {})
    with lock_run_folder(config):
        with pytest.raises(UserError, match="another process trains in"):
            check_run_folder(config, {})
        with pytest.raises(UserError, match="another process trains in"):
            lock_run_folder(config)
    check_run_folder(config, {})
