"""The folder of a run: resolved config, environment, metrics, TensorBoard, checkpoints.

runs/NAME/  config.yaml  environment.json  data.json  tokenizer.model  metrics.jsonl  tensorboard/  checkpoints/
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megastruct.checkpoint.intact import newest_of_right_size
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
LOCK_FILE = ".lock"


def run_folder(config: Config) -> Path:
    return Path(config.run.folder) / config.run.name


def checkpoints_folder(config: Config) -> Path:
    return run_folder(config) / "checkpoints"


def finished_steps(config: Config) -> int:
    """Steps of the newest complete checkpoint of which no file is cut off, 0 if there is none."""
    latest = newest_of_right_size(checkpoints_folder(config))
    return step_of(latest) if latest else 0


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def check_run_folder(config: Config, data: dict[str, Any]) -> None:
    """Raises UserError if the folder cannot be written, is in use, or holds a run of another config or other data."""
    folder = run_folder(config)
    lock_run_folder(config, shared=True).release()  # all ranks ask at once: they must not refuse each other
    if not (folder / CONFIG_FILE).exists():
        return
    changes = changes_of_the_run(load_config(folder / CONFIG_FILE), config)
    problems = [Problem(path, f"{new!r}, but the run was started with {old!r}") for path, old, new in changes]
    problems += [
        Problem(f"data ({key})", f"{data.get(key)!r}, but the run was started with {value!r}")
        for key, value in described_data(config).items()
        if data.get(key) != value
    ]
    if problems:
        raise UserError(
            [*problems, Problem("", "a run folder holds one run", f"run.name={config.run.name}-2 for a new run")],
            headline=f"{folder} holds a run of another config",
        )


def lock_run_folder(config: Config, shared: bool = False) -> FileLock:
    """Make the folder and take its lock, which is held until it is released or the process ends.

    `shared`: beside others that only ask. The one that trains has it alone.
    Raises UserError if the folder cannot be written or locked, or another process trains in it.
    """
    folder = run_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / LOCK_FILE, "run.folder", shared=shared)
    except LockHeldError:
        found = f"another process trains in {folder}"
        raise UserError(Problem("run.name", found, f"wait for it, or run.name={config.run.name}-2")) from None
    except OSError as error:
        raise UserError(Problem("run.folder", f"{folder}: {error.strerror}", "run.folder=runs")) from None


def described_data(config: Config) -> dict[str, Any]:
    """What the data was when the run was started; empty if it has not been yet."""
    path = run_folder(config) / DATA_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(Problem(str(path), f"cannot be read ({error.strerror})", "make it readable")) from None
    except ValueError as error:
        raise UserError(Problem(str(path), f"no valid JSON: {error}", "remove the file")) from None


def write_run_folder(config: Config, data: dict[str, Any], tokenizer: Path) -> dict[str, str]:
    """Write the descriptions and copy the tokenizer, on rank 0; returns them as title -> text for TensorBoard."""
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TOKENIZER_FILE, tokenizer.read_bytes())  # which may be the file in this folder
    texts = {
        CONFIG_FILE: dump_config(config),
        ENVIRONMENT_FILE: json.dumps(describe_environment(), indent=1),
        DATA_FILE: json.dumps(data, indent=1),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return texts
