#!/usr/bin/env python
"""Submit a run to Slurm.

python tools/submit.py CONFIG [section.key=value ...] --nodes 2 --gpus-per-node 8 --time 1200
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # so that it runs from a checkout that is not installed
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "tools")]

from megastruct.commands.submit import main

if __name__ == "__main__":
    main()
