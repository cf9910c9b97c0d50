"""Runs a launcher of ranks in this process, so that it ends together with the command that started it.

python -m megastruct.launch.launcher PARENT STOP_FILE MODULE [ARGUMENT ...]

PARENT: the process id of that command. STOP_FILE: made when that process has ended, where ranks run on machines that
the launcher reached by ssh; empty: this process ends at once, and its ranks with it. MODULE: the launcher itself, of
deepspeed or torch.
"""

from __future__ import annotations

from megastruct.import_path import leave_out_working_folder

if __name__ == "__main__":
    leave_out_working_folder()

import logging
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from megastruct.errors import EXIT_CODE_START_AGAIN, EXIT_CODE_USER_ERROR
from megastruct.processes import LAUNCHER_VARIABLE, end_with_parent, when_parent_ends


def launcher_command(module: str, arguments: Sequence[str], stop_file: Path | None = None) -> list[str]:
    """The argv that runs the launcher `module` as a child of this process."""
    us = [sys.executable, "-u", "-m", "megastruct.launch.launcher", str(os.getpid()), str(stop_file or "")]
    return [*us, module, *arguments]


def main(argv: Sequence[str]) -> None:
    """Run the launcher. The exit code of ranks that have said why they ended is passed on."""
    parent, stop_file, module, *arguments = argv
    if stop_file:
        when_parent_ends(int(parent), Path(stop_file).touch)
    else:
        end_with_parent(int(parent))
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    # Of a rank that has said why it ends, torch would report the exit code; of others its traceback does.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception as error:
        code = _code_of_the_ranks(error)
        if code not in (EXIT_CODE_USER_ERROR, EXIT_CODE_START_AGAIN):
            raise
        raise SystemExit(code) from None


def _code_of_the_ranks(error: Exception) -> int | None:
    """The exit code of the rank that ended first, from torch's ChildFailedError; None for another error."""
    first_failure = getattr(error, "get_first_failure", None)
    return first_failure()[1].exitcode if first_failure else None


if __name__ == "__main__":
    main(sys.argv[1:])
