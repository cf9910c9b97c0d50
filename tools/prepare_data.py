#!/usr/bin/env python
"""Tokenise text shards once into token shards, so that training need not tokenise.

python tools/prepare_data.py --input DIR_OR_GLOB --output tokens/ --tokenizer tokenizer.model --workers 8
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # so that it runs from a checkout that is not installed
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "tools")]

from megastruct.commands.prepare import main

if __name__ == "__main__":
    main()
