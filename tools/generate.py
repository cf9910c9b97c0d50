#!/usr/bin/env python
"""Continue a text with a trained model: python tools/generate.py runs/quickstart --prompt "The file"."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # so that it runs from a checkout that is not installed
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "tools")]

from megastruct.commands.generate import main

if __name__ == "__main__":
    main()
