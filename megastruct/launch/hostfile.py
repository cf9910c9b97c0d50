"""The hostfile: a line `host slots=N` for every node, as deepspeed's launcher reads it."""

from __future__ import annotations

import re
from pathlib import Path

from megastruct.errors import Problem, Problems, UserError

# Of the hosts that deepspeed takes, those that neither ssh nor a shell could take for anything else.
_LINE = re.compile(r"((?:[\w.-]+@)?[A-Za-z0-9][\w.:-]*)\s+slots=(\d+)(?:[\s#].*)?", re.ASCII)


def read_hostfile(path: Path) -> dict[str, int]:
    """The number of processes by host (`user@host` where a user is given), in the order of the lines.

    What follows the slots of a line is a remark. Raises UserError with all lines that are not of this form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        found = f"{path}: {getattr(error, 'strerror', None) or 'not a UTF-8 text file'}"
        raise UserError(Problem("--hostfile", found, "a file with lines such as: node1 slots=8")) from None
    slots: dict[str, int] = {}
    problems = Problems()
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if not match or line.lstrip().startswith("-") or int(match[2]) < 1:
            found = f"{line.strip()!r} is not a valid hostfile line"
            problems.append(Problem(f"{path}:{number}", found, "node1 slots=8"))
        elif match[1] in slots:
            suggestion = f"one line, {match[1]} slots={slots[match[1]] + int(match[2])}"
            problems.append(Problem(f"{path}:{number}", f"{match[1]} has a line already", suggestion))
        else:
            slots[match[1]] = int(match[2])
    problems.raise_if_any()
    return slots


def hostfile_slots(path: Path, num_nodes: int | None, node_rank: int | None) -> list[int]:
    """The number of processes per node, from the first `num_nodes` hosts of the file.

    Raises UserError if the file cannot be read, or has fewer hosts than the options need.
    """
    slots = list(read_hostfile(path).values())[:num_nodes]
    if not slots or (num_nodes or 0) > len(slots) or (node_rank or 0) >= len(slots):
        found = f"{path} names {len(slots)} hosts"
        raise UserError(Problem("--num-nodes, --node-rank", found, "numbers that fit the file; node ranks start at 0"))
    return slots
