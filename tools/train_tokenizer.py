#!/usr/bin/env python
"""Train a SentencePiece tokenizer like LLaMA's (BPE with byte fallback) on text shards.

python tools/train_tokenizer.py --input DIR_OR_GLOB --output tokenizers/en32k/ --vocab-size 32000
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # so that it runs from a checkout that is not installed
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "tools")]

from megastruct.commands.train_tokenizer import main

if __name__ == "__main__":
    main()
