#!/usr/bin/env python
"""Benchmark parts of the project against common alternatives.

python tools/benchmark.py data --input DIR_OR_GLOB --tokenizer tokenizer.model
python tools/benchmark.py documents configs/run/s_dense.yaml training.micro_batch_size=8
python tools/benchmark.py step configs/run/s_lowrank_32.yaml training.compile=true
python tools/benchmark.py kernels --widths 2048 --compile both
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # so that it runs from a checkout that is not installed
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "tools")]

from megastruct.commands.benchmark import main

if __name__ == "__main__":
    main()
