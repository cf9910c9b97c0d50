#!/usr/bin/env python
"""Plot curves of several runs as a PNG: python tools/plot_runs.py runs/dense runs/lowrank --output curves.png."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # so that it runs from a checkout that is not installed
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "tools")]

from megastruct.commands.plot_runs import main

if __name__ == "__main__":
    main()
