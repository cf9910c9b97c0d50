"""The folder of a run: resolved config, environment, metrics, TensorBoard, checkpoints.

runs/NAME/  config.yaml  environment.json  data.json  tokenizer.model  metrics.jsonl  checkpoints/
            events.out.tfevents.* (TensorBoard)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megastruct.checkpoint.intact import newest_of_right_size
from megastruct.checkpoint.store import step_of
from megastruct.config.compare import changes_of_the_run
from megastruct.config.load import dump_config, load_config
from megastruct.config.schema import Config
from megastruct.errors import Problem, UserError
from megastruct.files import FileLock, LockHeldError, write_atomically
from megastruct.launch.environment import describe_environment

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
DATA_FILE = "data.json"
TOKENIZER_FILE = "tokenizer.model"
CHECKPOINTS = "checkpoints"
LOCK_FILE = ".lock"


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
        if not (self.path / CONFIG_FILE).exists():
            return
        changes = changes_of_the_run(load_config(self.path / CONFIG_FILE), self.config)
        problems = [Problem(path, f"{new!r}, but the run was started with {old!r}") for path, old, new in changes]
        problems += [
            Problem(f"data ({key})", f"{data.get(key)!r}, but the run was started with {value!r}")
            for key, value in self.described_data().items()
            if data.get(key) != value
        ]
        if problems:
            raise UserError(
                [*problems, Problem("", "a run folder holds one run", f"run.name={self.path.name}-2 for a new run")],
                headline=f"{self.path} holds a run of another config",
            )

    def lock(self, shared: bool = False) -> FileLock:
        """Make the folder and take its lock, which is held until it is released or the process ends.

        `shared`: hold it together with other processes that only check. The process that trains holds it alone.
        Raises UserError if the folder cannot be written or another process trains in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return FileLock(self.path / LOCK_FILE, "run.folder", shared=shared)
        except OSError as error:
            raise UserError(Problem("run.folder", f"{self.path}: {error.strerror}", "run.folder=runs")) from None
        except LockHeldError:
            found = f"another process trains in {self.path}"
            raise UserError(Problem("run.name", found, f"wait for it, or run.name={self.path.name}-2")) from None

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

    def write(self, data: dict[str, Any], tokenizer: Path) -> dict[str, str]:
        """Write the descriptions and copy the tokenizer, on rank 0; returns them as title -> text for TensorBoard."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / TOKENIZER_FILE, tokenizer.read_bytes())  # which may be this file itself
        texts = {
            CONFIG_FILE: dump_config(self.config),
            ENVIRONMENT_FILE: json.dumps(describe_environment(), indent=1),
            DATA_FILE: json.dumps(data, indent=1),
        }
        for name, text in texts.items():
            write_atomically(self.path / name, text)
        return texts
