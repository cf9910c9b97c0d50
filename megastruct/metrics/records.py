"""What run folders say of themselves: their records, and the axes and groups by which they are compared."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from megastruct.config.load import load_config
from megastruct.config.schema import Config
from megastruct.errors import Problem, Problems, UserError
from megastruct.planning.cost import training_flops_per_token
from megastruct.planning.plan import ffn_share
from megastruct.structures import DENSE

# Names for the horizontal axis, beside every key of the records.
AXES = {"steps": "step", "wall_time": "wall_time_seconds", "gpu_hours": "device_hours"}
VALIDATION = "validation_loss"
FLOPS = "training_flops"


@dataclass(frozen=True)
class Run:
    """A run folder, its records, and the group in which it is compared (None: that of its structure)."""

    folder: Path
    records: list[dict[str, Any]]
    group_name: str | None = None

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.name

    @cached_property
    def config(self) -> Config | None:
        """The config of the run; None if the folder has none that can be read."""
        try:
            return load_config(self.folder / "config.yaml")
        except UserError:
            return None

    @property
    def group(self) -> str:
        """The given group, else the structure and its share of the dense weights, else the name."""
        if self.group_name is not None or self.config is None:
            return self.group_name or self.name
        ffn = self.config.ffn
        return DENSE if ffn.structure == DENSE else f"{ffn.structure} {round(100 * ffn_share(self.config, ffn))} %"

    def value(self, record: dict[str, Any], key: str) -> float | None:
        """A number of one record by its key; None if it is unknown.

        Runs of before training FLOPs were recorded have them from the config, unless guides made a step's vary.
        """
        found = record.get(key)
        if found is None and key == FLOPS and self.config is not None and self.config.guided.schedule == "off":
            tokens = record.get("tokens")
            found = None if tokens is None else tokens * training_flops_per_token(self.config)
        return found if _is_number(found) else None

    def points(self, x: str, y: str) -> list[tuple[float, float]]:
        """(x, y) of all records that have both."""
        pairs = ((self.value(record, x), self.value(record, y)) for record in self.records)
        return [(a, b) for a, b in pairs if a is not None and b is not None]

    def last(self, key: str) -> float | None:
        """The last known value; None without one."""
        values = [value for record in self.records if (value := self.value(record, key)) is not None]
        return values[-1] if values else None


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """The runs of FOLDER or GROUP=FOLDER. Raises UserError with all folders whose records cannot be read."""
    problems, runs = Problems(), []
    for argument in arguments:
        run = problems.collect(partial(_read, argument))
        runs += [run] if run else []
    problems.raise_if_any()
    return runs


def known_keys(runs: Sequence[Run]) -> set[str]:
    """The keys of all numbers in the records."""
    keys = {key for run in runs for record in run.records for key, value in record.items() if _is_number(value)}
    return keys | ({FLOPS} if any(run.last(FLOPS) is not None for run in runs) else set())


def _read(argument: str) -> Run:
    group, equals, path = argument.partition("=")
    named = bool(equals) and not Path(argument).exists()
    folder = Path(path if named else argument)
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        # The last line may be incomplete.
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return Run(folder.absolute(), records, group if named else None)
    except (OSError, ValueError) as error:
        found = f"metrics.jsonl cannot be read ({getattr(error, 'strerror', None) or error})"
        raise UserError(Problem(str(folder), found, "give a run folder, for example runs/quickstart")) from None


def labels(names: Sequence[str]) -> list[str]:
    """Legend labels: runs whose names differ only in a final _DIGIT, such as a seed, share a label and a color."""
    stems = [re.sub(r"_\d$", "", name) for name in names]
    return [stem if stems.count(stem) > 1 else name for name, stem in zip(names, stems, strict=True)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
