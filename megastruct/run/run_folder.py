"""The folder of a run: resolved config, environment, metrics, TensorBoard, checkpoints.

runs/NAME/  config.yaml  environment.json  data.json  metrics.jsonl  checkpoints/  profile/
            tokenizer.model (or tokenizer.json and tokenizer_options.json)
            events.out.tfevents.* (TensorBoard)  extensions.json  origin.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megastruct.checkpoint.intact import newest_of_right_size
from megastruct.checkpoint.store import step_of
from megastruct.config.compare import changes_of_the_run, extension
from megastruct.config.load import dump_config, load_config
from megastruct.config.schema import Config
from megastruct.errors import Problem, UserError
from megastruct.files import FileLock, LockHeldError, write_atomically
from megastruct.launch.environment import describe_environment

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
DATA_FILE = "data.json"
EXTENSIONS_FILE = "extensions.json"
CHECKPOINTS = "checkpoints"
LOCK_FILE = ".lock"


def read_description(run: Path) -> dict[str, Any]:
    """What the record of the run in the folder `run` says of its data; empty if there is no record."""
    return read_record(run / DATA_FILE)


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a run folder; empty if there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


class RunFolder:
    """The folder of the run of `config`. Making the object touches no disk."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = Path(config.run.folder) / config.run.name

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.path / CHECKPOINTS

    def finished_steps(self) -> int:
        """Steps of the newest complete checkpoint of which no file is truncated, 0 if there is none."""
        latest = newest_of_right_size(self.checkpoints)
        return step_of(latest) if latest else 0

    def check(self, data: dict[str, Any]) -> None:
        """Raises UserError if the folder cannot be written, is in use, or holds a run of another config or data."""
        self.lock(shared=True).release()  # all ranks ask at once: they must not refuse each other
        self.check_config(data)

    def check_config(self, data: dict[str, Any] | None = None) -> None:
        """Raises UserError if the folder holds a run of another config or of other `data`. Writes nothing."""
        if not (self.path / CONFIG_FILE).exists():
            return
        changes = changes_of_the_run(load_config(self.path / CONFIG_FILE), self.config)
        problems = [Problem(path, f"{new!r}, but the run was started with {old!r}") for path, old, new in changes]
        problems += [
            Problem(f"data ({key})", f"{data.get(key)!r}, but the run was started with {value!r}")
            for key, value in (self.described_data() if data is not None else {}).items()
            if data is not None and data.get(key) != value
        ]
        if problems:
            new_name = f"run.name={self.path.name}-2"
            advice = f"{new_name} for a new run, or {new_name} run.from={self.path} for a branch of this one"
            raise UserError(
                [*problems, Problem("", "a run folder holds one run, which can be made longer", advice)],
                headline=f"{self.path} holds a run of another config",
            )

    def lock(self, shared: bool = False) -> FileLock:
        """Make the folder and take its lock, which is held until it is released or the process ends.

        `shared`: hold it together with other processes that only check. The process that trains holds it alone.
        Raises UserError if the folder cannot be written or another process trains in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK_FILE, shared=shared)
        except OSError as error:
            suggestion = "a folder that you can write, such as run.folder=~/runs"
            raise UserError(Problem("run.folder", f"{self.path}: {error.strerror}", suggestion)) from None
        except LockHeldError:
            found = f"another process trains in {self.path}"
            raise UserError(Problem("run.name", found, f"wait for it, or run.name={self.path.name}-2")) from None
        if lock.warning and not shared:
            print(f"warning: {lock.warning}", file=sys.stderr, flush=True)
        return lock

    def described_data(self) -> dict[str, Any]:
        """The description of the data from when the run was started; empty if it was not started yet."""
        path = self.path / DATA_FILE
        try:
            described = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(described, dict):
                raise ValueError("it is not a JSON object")
            return described
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise UserError(Problem(str(path), f"cannot be read ({error.strerror})", "make it readable")) from None
        except ValueError as error:
            raise UserError(Problem(str(path), f"not valid JSON: {error}", "remove the file")) from None

    def write(self, data: dict[str, Any], tokenizer: Mapping[str, bytes]) -> dict[str, str]:
        """Write the descriptions and the tokenizer's files by name, on rank 0.

        If the config makes the run longer than before, that is recorded and said on stderr.

        Returns:
            The descriptions as title -> text for TensorBoard.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._record_extension()
        for name, content in tokenizer.items():
            write_atomically(self.path / name, content)
        texts = {
            CONFIG_FILE: dump_config(self.config),
            ENVIRONMENT_FILE: json.dumps(describe_environment(), indent=1),
            DATA_FILE: json.dumps(data, indent=1),
        }
        for name, text in texts.items():
            write_atomically(self.path / name, text)
        return texts

    def _record_extension(self) -> None:
        """Append to extensions.json how the config makes the run longer, if it does."""
        if not (self.path / CONFIG_FILE).exists():
            return
        longer = extension(load_config(self.path / CONFIG_FILE), self.config)
        if longer is None:
            return
        path, finished = self.path / EXTENSIONS_FILE, self.finished_steps()
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        record = {"finished_steps": finished, **longer._asdict(), "schedule": longer.schedule}
        write_atomically(path, json.dumps([*before, record], indent=1))
        print(
            f"{self.path}: {longer.new_steps} instead of {longer.old_steps} steps, from step {finished} on; "
            f"the schedule is {longer.schedule} (its length is {longer.schedule_steps} steps).",
            file=sys.stderr,
            flush=True,
        )
