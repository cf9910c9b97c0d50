#!/usr/bin/env python
"""Write a few MB of real English text as shards in RefinedWeb's schema, without a download.

python tools/make_sample_corpus.py --output corpus/
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # so that it runs from a checkout that is not installed
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "tools")]

from megastruct.commands.make_sample_corpus import main

if __name__ == "__main__":
    main()
