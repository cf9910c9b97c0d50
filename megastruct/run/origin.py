"""Where a run's first weights come from: a record in the run folder, which outlives the first checkpoint.

origin.json: {"kind": "run", "folder": ..., "step": ..., "inherit": ..., "tokens": ..., "origin": the parent's own}
             {"kind": "huggingface", "folder": ...}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megastruct.files import write_atomically

ORIGIN_FILE = "origin.json"


def origin(run: Path) -> dict[str, Any] | None:
    """What the run began with; None if it began with random weights, or if that is not known."""
    try:
        values = json.loads((run / ORIGIN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def write_origin(run: Path, values: dict[str, Any]) -> None:
    """Record what a run begins with. Raises OSError."""
    write_atomically(run / ORIGIN_FILE, json.dumps(values, indent=1))
