#!/usr/bin/env python
"""Write docs/config.md and configs/schema.json from the schema of configs: python tools/write_reference.py.

`--check` writes nothing and exits with 1 if one of them is not current.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # so that it runs from a checkout that is not installed
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "tools")]

from megastruct.config.reference import json_schema, tables

PAGE, SCHEMA = ROOT / "docs" / "config.md", ROOT / "configs" / "schema.json"
MARK = "<!-- Below this line, tools/write_reference.py writes the page. -->\n"  # above it, it is written by hand


def main() -> int:
    """The exit code: 0, or 1 if `--check` finds a file that is not current."""
    parser = argparse.ArgumentParser(description="Write docs/config.md and configs/schema.json.")
    parser.add_argument("--check", action="store_true", help="only compare; exit code 1 if a file is not current")
    check = parser.parse_args().check
    by_hand = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    contents = {PAGE: f"{by_hand}{MARK}\n{tables()}", SCHEMA: json.dumps(json_schema(), indent=2) + "\n"}
    stale = {path: text for path, text in contents.items() if not path.exists() or path.read_text() != text}
    for path, text in stale.items():
        if check:
            print(f"{path.relative_to(ROOT)} is not current; run tools/write_reference.py", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
