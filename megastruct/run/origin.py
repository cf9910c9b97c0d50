"""Where a run's first weights come from: a record in the run folder, which outlives the first checkpoint.

origin.json: {"kind": "run", "folder": ..., "step": ..., "inherit": ..., "optimizer": that of the checkpoint,
              "tokens": ..., "origin": the parent's own}
             {"kind": "huggingface", "folder": ...}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megastruct.files import write_atomically
from megastruct.run.run_folder import read_record

ORIGIN_FILE = "origin.json"


def origin(run: Path) -> dict[str, Any] | None:
    """What the run began with; None if it began with random weights, or if that is not known."""
    return read_record(run / ORIGIN_FILE) or None


def write_origin(run: Path, values: dict[str, Any]) -> None:
    """Record what a run begins with. Raises OSError."""
    write_atomically(run / ORIGIN_FILE, json.dumps(values, indent=1))
