#!/usr/bin/env python
"""Make first weights of a run from a Hugging Face folder: python tools/import_model.py FOLDER CONFIG.yaml."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # so that it runs from a checkout that is not installed
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "tools")]

from megastruct.commands.import_model import main

if __name__ == "__main__":
    main()
