#!/usr/bin/env python
"""Estimate what a config costs: python tools/plan.py configs/run/xl_lowrank_32.yaml parallel.pp=2."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # so that it runs from a checkout that is not installed
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "tools")]

from megastruct.commands.plan import main

if __name__ == "__main__":
    main()
