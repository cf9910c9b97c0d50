#!/usr/bin/env python
"""Show the contents of a folder of token shards, or verify it: python tools/inspect_data.py tokens/ --verify."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # so that it runs from a checkout that is not installed
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "tools")]

from megastruct.commands.inspect import main

if __name__ == "__main__":
    main()
