#!/usr/bin/env python
"""Export a trained run for Hugging Face's transformers: python tools/export.py runs/quickstart exported."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # so that it runs from a checkout that is not installed
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "tools")]

from megastruct.commands.export import main

if __name__ == "__main__":
    main()
