"""What run folders say of themselves: their records, and the axes and groups by which they are compared."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

from megastruct.config.load import load_config
from megastruct.config.schema import Config
from megastruct.errors import Problem, Problems, UserError
from megastruct.paths import expanded_at
from megastruct.planning.cost import total_parameters, training_flops_per_token
from megastruct.planning.plan import ffn_share
from megastruct.structures import DENSE

# Names for the horizontal axis, beside every key of the records.
AXES = {"steps": "step", "wall_time": "wall_time_seconds", "gpu_hours": "device_hours"}
VALIDATION = "validation_loss"
FLOPS = "training_flops"
TOKENS = "tokens"
PARAMETERS = "parameters"
# Sizes must divide the widths, so one structure has a slightly different share of the dense weights in each model: the
# paper's BlockDense at 32 % has 31.3 % (s, l) or 29.3 % (m, xl). Shares within this factor count as the same.
SIMILAR = 1.1


@dataclass(frozen=True)
class Run:
    """A run folder, its records, and the group that the user gave it, if any."""

    folder: Path
    records: list[dict[str, Any]]
    group_name: str | None = None

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.absolute().name

    @cached_property
    def config(self) -> Config | None:
        """The config of the run; None if the folder has none that can be read."""
        try:
            return load_config(self.folder / "config.yaml")
        except UserError:
            return None

    def value(self, record: dict[str, Any], key: str) -> float | None:
        """A number of one record by its key; None if it is unknown.

        The config gives the parameters. It also gives the tokens and, unless guides made them vary, the training FLOPs
        of records from before these were written.
        """
        found = record.get(key)
        if found is None and self.config is not None and "step" in record:
            tokens = self.config.training.tokens(record["step"])
            if key == TOKENS:
                found = tokens
            elif key == FLOPS and self.config.guided.schedule == "off":
                found = tokens * training_flops_per_token(self.config)
            elif key == PARAMETERS:
                found = total_parameters(self.config)
        return found if _is_number(found) else None

    def points(self, x: str, y: str) -> list[tuple[float, float]]:
        """(x, y) of all records that have both."""
        pairs = ((self.value(record, x), self.value(record, y)) for record in self.records)
        return [(a, b) for a, b in pairs if a is not None and b is not None]

    def last_record(self, key: str) -> dict[str, Any]:
        """The last record that has `key`; without one the last record of all, or {}."""
        having = [record for record in self.records if self.value(record, key) is not None]
        return (having or self.records or [{}])[-1]


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """The runs of FOLDER or GROUP=FOLDER. Raises UserError with all folders whose records cannot be read."""
    problems, runs = Problems(), []
    for argument in arguments:
        run = problems.collect(partial(_read, argument))
        runs += [run] if run else []
    problems.raise_if_any()
    return runs


def known_keys(runs: Sequence[Run]) -> set[str]:
    """The keys of all numbers in the records, and of those that the configs give."""
    keys = {key for run in runs for record in run.records for key, value in record.items() if _is_number(value)}
    derived = (TOKENS, FLOPS, PARAMETERS)
    return keys | {key for run in runs for key in derived if run.value(run.last_record(key), key) is not None}


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs by the group that the user gave, else by structure, share of the dense weights, guides and optimizer.

    A run without a config is a group of its own.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group_name or _structure(run, runs), []).append(run)
    return groups


def _structure(run: Run, runs: Sequence[Run]) -> str:
    if run.config is None:
        return run.name
    structure, *others = kind = _kind(run.config)
    if structure == DENSE:
        return ", ".join((DENSE, *others))
    configs = [other.config for other in runs if other.group_name is None and other.config is not None]
    alike: list[float] = []
    for share in sorted(ffn_share(config, config.ffn) for config in configs if _kind(config) == kind):
        if alike and share > SIMILAR * alike[-1]:
            if alike[-1] >= ffn_share(run.config, run.config.ffn):
                break
            alike = []
        alike.append(share)
    return ", ".join((f"{structure} {round(100 * fmean(alike))} %", *others))


def _kind(config: Config) -> tuple[str, ...]:
    """The structure, and what else is not the paper's default."""
    guided = ("guided",) if config.guided.schedule != "off" else ()
    return config.ffn.structure, *guided, *((config.optimizer.kind,) if config.optimizer.kind != "adamw" else ())


def _read(argument: str) -> Run:
    group, equals, path = argument.partition("=")
    named = bool(equals) and not Path(argument).exists()
    folder = Path(expanded_at(path if named else argument, argument))
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        # The last line may be incomplete.
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        if any(not isinstance(record, dict) for record in records):
            raise ValueError("a line is not a JSON object")
        return Run(folder, records, group if named else None)
    except (OSError, ValueError) as error:
        found = f"metrics.jsonl cannot be read ({getattr(error, 'strerror', None) or error})"
        raise UserError(Problem(str(folder), found, "give a run folder, for example runs/quickstart")) from None


def labels(names: Sequence[str]) -> list[str]:
    """Legend labels: runs whose names differ only in a final _DIGIT, such as a seed, share a label and a color."""
    stems = [re.sub(r"_\d$", "", name) for name in names]
    return [stem if stems.count(stem) > 1 else name for name, stem in zip(names, stems, strict=True)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
