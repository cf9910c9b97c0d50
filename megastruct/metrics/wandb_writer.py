"""The curves of a run in Weights & Biases, beside TensorBoard's and under the same names.

The id of its run stands in the run folder, so that a restart continues it. What fails there is said once; the run goes
on without it, and its own files have every record.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megastruct.config.schema import Config
from megastruct.errors import Problem
from megastruct.files import write_atomically
from megastruct.stops import blocked

ID_FILE = "wandb.json"
_PATIENCE_SECONDS = 60  # for the start and the last upload, in which the other ranks wait


def check_wandb(config: Config) -> Iterator[Problem]:
    """A problem if the config asks for it and the package is missing."""
    if config.logging.wandb_project and importlib.util.find_spec("wandb") is None:
        found = f"{config.logging.wandb_project}, but the package wandb is not installed"
        yield Problem("logging.wandb_project", found, "pip install 'megastruct[wandb]', or logging.wandb_project=null")


def open_wandb(config: Config, folder: Path) -> WandbWriter | None:
    """The writer of the run in `folder`; None if the config does not ask for one."""
    return WandbWriter(config, folder) if config.logging.wandb_project else None


class WandbWriter:
    """Sends values to one run of Weights & Biases. No method raises."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._run: Any = None
        self._attempt(lambda: self._start(config, folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of one step, by name; a step that is trained again is sent again."""
        if self._run:
            self._attempt(lambda: self._run.log({"step": step, **values}))

    def close(self) -> None:
        """Send what is left, for at most `_PATIENCE_SECONDS`."""
        if self._run:
            self._attempt(lambda: self._run.finish())
        if self._run:
            self._leave()

    def _start(self, config: Config, folder: Path) -> None:
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            init_timeout=_PATIENCE_SECONDS,
            finish_timeout=_PATIENCE_SECONDS,
            finish_timeout_raises=True,
        )
        with blocked(), _no_questions():  # its process must not end by a signal that asks the run to stop
            run = wandb.init(
                project=config.logging.wandb_project,
                entity=config.logging.wandb_entity,
                name=config.run.name,
                id=_id_of(folder),
                resume="allow",
                dir=folder,
                config=config.model_dump(mode="json"),
                settings=settings,
            )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._run = run
        print(f"Weights & Biases: {run.url or run.dir}", file=sys.stderr, flush=True)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # of a service that the run must not depend on
            self._leave()
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            print(f"warning: the run goes on without Weights & Biases: {line}", file=sys.stderr, flush=True)

    def _leave(self) -> None:
        """End the service. Its own hook, at the end of this process, would wait without a limit, or fail there."""
        self._run = None
        thread = threading.Thread(target=_end_service, name="wandb", daemon=True)
        thread.start()
        thread.join(_PATIENCE_SECONDS)


def _end_service() -> None:
    import wandb

    with suppress(Exception, SystemExit):  # it exits with the code of a service that has failed
        wandb.teardown()


@contextmanager
def _no_questions() -> Iterator[None]:
    """Without an API key it would ask for one on a terminal, and wait."""
    before = sys.stdin
    with open(os.devnull, encoding="utf-8") as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = before


def _id_of(folder: Path) -> str:
    """The id of the run in `folder`, which is chosen at its first start."""
    path = folder / ID_FILE
    if not path.exists():
        write_atomically(path, json.dumps({"id": uuid.uuid4().hex[:16]}))
    return json.loads(path.read_text(encoding="utf-8"))["id"]
