"""torchrun, with the stops and exit codes of ./launch.sh:

python -m megastruct.torchrun [options of torchrun] -m megastruct.train CONFIG [section.key=value ...]

By itself torchrun ends ranks half a minute after a signal, whether they have saved or not, and exits with 1 and a
traceback of its own for every exit code of theirs.
"""

from __future__ import annotations

from megastruct.import_path import import_variables, leave_out_working_folder

if __name__ == "__main__":
    leave_out_working_folder()

import os
import sys
from collections.abc import Sequence

from megastruct.console import lasting_command
from megastruct.launch.launcher import launcher_command
from megastruct.launch.running import run_launcher


@lasting_command
def main(argv: Sequence[str] | None = None) -> None:
    """Run torchrun; exit code 2 for a user error, 75 if the run was asked to stop and has saved, else torchrun's."""
    command = launcher_command("torch.distributed.run", list(sys.argv[1:] if argv is None else argv))
    status = run_launcher(command, os.environ | import_variables())
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    main()
