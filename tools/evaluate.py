#!/usr/bin/env python
"""Measure a trained model on token shards, text or tasks: python tools/evaluate.py runs/quickstart --data tokens/."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # so that it runs from a checkout that is not installed
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "tools")]

from megastruct.commands.evaluate import main

if __name__ == "__main__":
    main()
