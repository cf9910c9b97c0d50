"""Brings a run back from its mirror: into an empty run folder, or one whose newest checkpoint is older."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megastruct.checkpoint.intact import set_aside
from megastruct.checkpoint.store import checkpoint_folder
from megastruct.config.compare import changes_of_the_run
from megastruct.config.load import load_config
from megastruct.config.schema import Config
from megastruct.errors import Problem, UserError
from megastruct.files import FileLock, sync_folder
from megastruct.launch.environment import is_first_process
from megastruct.run.mirror import WHERE, DamagedError, Mirror
from megastruct.run.run_folder import CONFIG_FILE, RunFolder

_LOCK_FILE = ".restore.lock"


class Restore:
    """What the mirror of a run has and its folder lacks; nothing if the run has no mirror.

    All ranks of a run use this at once. One process at a time downloads into a folder; the others wait for it and find
    the work done.
    """

    def __init__(self, config: Config) -> None:
        """List the mirror, and check that it can be written.

        Raises:
            UserError: the mirror cannot be used.
        """
        self._folder = RunFolder(config)
        self._mirror = Mirror(config) if config.checkpoint.mirror else None
        self._steps: list[int] = []  # newer than the folder's, newest first
        if self._mirror:
            if is_first_process():
                self._mirror.check_writable()
            own = self._folder.finished_steps()
            self._steps = [step for step in reversed(self._mirror.complete_steps()) if step > own]

    def files(self) -> None:
        """Download the files of the run besides its checkpoints, if the mirror has a newer checkpoint.

        Raises:
            UserError: the download failed, or the folder holds another run than the mirror.
        """
        if not self._mirror or not self._steps:
            return
        with self._alone() as steps, tempfile.TemporaryDirectory(dir=self._folder.path, prefix=".restoring-") as aside:
            if not steps:
                return
            self._mirror.get_files(Path(aside))
            self._refuse_another_run(Path(aside))
            for path in [path for path in Path(aside).rglob("*") if path.is_file()]:
                target = self._folder.path / path.relative_to(aside)
                target.parent.mkdir(exist_ok=True)
                os.replace(path, target)

    def _refuse_another_run(self, aside: Path) -> None:
        own, other = self._folder.path / CONFIG_FILE, aside / CONFIG_FILE
        if own.exists() and other.exists() and changes_of_the_run(load_config(own), load_config(other)):
            assert self._mirror
            found = f"{self._mirror.address} holds a newer run of another config than {self._folder.path}"
            raise UserError(Problem(WHERE, found, f"another address, or run.name={self._folder.path.name}-2"))

    def checkpoint(self) -> None:
        """Download the newest checkpoint whose checksums are right, if it is newer than those of the folder.

        Raises:
            UserError: all newer ones are damaged and the folder has none, or the download failed.
        """
        if not self._mirror or not self._steps:
            return
        with self._alone() as steps:
            problems = []
            for step in steps:
                try:
                    self._download(self._mirror, step)
                    return
                except DamagedError as error:
                    problems.append(Problem(f"{self._mirror.address}, step {step}", f"damaged: {error}"))
                    print(f"warning: {problems[-1]}", file=sys.stderr, flush=True)
                    self._mirror.set_aside(step)
            if problems and not self._folder.finished_steps():
                last = Problem(WHERE, "every checkpoint of the mirror is damaged", "start a new run: another run.name")
                raise UserError([*problems, last])

    def _download(self, mirror: Mirror, step: int) -> None:
        final = checkpoint_folder(self._folder.checkpoints, step)
        aside = final.with_name(f".{final.name}.writing")  # which the next save removes, if this process is killed
        print(f"downloading the checkpoint of step {step} from {mirror.address}", file=sys.stderr, flush=True)
        shutil.rmtree(aside, ignore_errors=True)
        try:
            mirror.get_checkpoint(step, aside)
            if final.exists():  # with a file that is missing or truncated, or it would count
                set_aside([final])
            os.replace(aside, final)
            sync_folder(final.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    @contextlib.contextmanager
    def _alone(self) -> Iterator[list[int]]:
        """Keep other processes from restoring into the same folder; yields the steps that it lacks still."""
        self._folder.lock(shared=True).release()  # makes the folder
        with contextlib.ExitStack() as stack:
            stack.enter_context(FileLock(self._folder.path / _LOCK_FILE, wait=True))
            own = self._folder.finished_steps()
            yield [step for step in self._steps if step > own]
