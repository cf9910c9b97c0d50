"""Bounds that tests hold, and a record of how far results are from them.

With BOUNDS_FILE in the environment every check appends a line of JSON to that file:
{"case": the test, "what": ..., "measured": ..., "bound": ...}. `python tests/bounds.py FILE` prints the largest value
of every case as a table.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import SupportsFloat


def within(measured: SupportsFloat, bound: float, what: str) -> bool:
    """Whether a difference is no larger than its bound."""
    measured = float(measured)
    if path := os.environ.get("BOUNDS_FILE"):
        case = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"case": case, "what": what, "measured": measured, "bound": bound}) + "\n")
    return measured <= bound


def table(lines: list[str]) -> str:
    """For every case, quantity and bound, in their order, the largest measured value and its share of the bound."""
    largest: dict[tuple[str, str, float], float] = {}
    for line in lines:
        record = json.loads(line)
        key = record["case"], record["what"], record["bound"]
        known, measured = largest.get(key, -math.inf), record["measured"]
        largest[key] = math.nan if math.isnan(known) else measured if math.isnan(measured) else max(known, measured)
    rows = [
        f"| `{case}` | {what} | {measured:.2g} | {bound:.2g} | {f'{measured / bound:.0%}' if bound else ''} |"
        for (case, what, bound), measured in largest.items()
    ]
    return "\n".join(["| case | what | measured | bound | share |", "|---|---|---|---|---|", *rows])


if __name__ == "__main__":
    file = Path(sys.argv[1])
    print(table(file.read_text(encoding="utf-8").splitlines() if file.exists() else []))
