"""Copies the checkpoints of a run to its mirror while training continues.

Rank 0 copies, in one thread, after all ranks have completed a checkpoint. Nothing here is collective and no error
leaves the thread, so a mirror that fails can neither stop a run nor delay it.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from megastruct.checkpoint.checksums import MANIFEST_FILE
from megastruct.checkpoint.intact import newest_of_right_size
from megastruct.checkpoint.store import Keeping
from megastruct.config.schema import Config
from megastruct.data.sources.patience import reason
from megastruct.run.mirror import Mirror
from megastruct.run.run_folder import RunFolder

_LINKS = ".mirroring"  # hard links to the files that are being copied
_SILENT_SECONDS = 10.0  # of waiting
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 300.0


class Mirroring:
    """The thread that copies. It takes the newest checkpoint that it was offered; one that is overtaken is left out."""

    def __init__(self, mirror: Mirror, folder: Path, superseded: Callable[[Iterable[int]], list[int]]) -> None:
        """`folder`: the run folder. `superseded`: chooses the steps to remove from those at the mirror."""
        self._mirror, self._folder, self._superseded = mirror, folder, superseded
        self._changed = threading.Condition()
        self._waiting: Path | None = None  # the checkpoint to copy next
        self._copying: Path | None = None
        shutil.rmtree(folder / _LINKS, ignore_errors=True)  # of a killed run
        threading.Thread(target=self._run, name="mirror", daemon=True).start()

    @classmethod
    def of(cls, config: Config) -> Mirroring | None:
        """The thread for the mirror of a run; None if it has none."""
        if not config.checkpoint.mirror:
            return None
        return cls(
            Mirror(config),
            RunFolder(config).path,
            Keeping(config.checkpoint.keep, config.checkpoint.keep_every).outdated,
        )

    def offer(self, checkpoint: Path) -> None:
        """Let a complete checkpoint be copied. Returns immediately.

        Its files are linked, so that the copy can be completed even if the checkpoint is removed meanwhile.
        """
        with self._changed:
            self._remove_links(self._waiting)
            self._waiting = self._linked(checkpoint)
            self._changed.notify_all()

    def finish(self, seconds: float) -> None:
        """Wait for at most `seconds` until all that was offered is copied; after that, print a warning."""

        def done() -> bool:
            return not self._waiting and not self._copying

        with self._changed:
            if not self._changed.wait_for(done, min(seconds, _SILENT_SECONDS)) and seconds > _SILENT_SECONDS:
                print(f"copying the last checkpoint to {self._mirror.address}", file=sys.stderr, flush=True)
            if not self._changed.wait_for(done, max(0.0, seconds - _SILENT_SECONDS)):
                left = self._waiting or self._copying
                assert left
                _warn(
                    f"{left.name} was not copied to {self._mirror.address} within {seconds:g} s. It is complete in "
                    f"{self._folder}; run the same command again to copy it"
                )

    def _linked(self, checkpoint: Path) -> Path:
        """A folder of hard links to the files of a checkpoint; the checkpoint where the file system has none."""
        links = self._folder / _LINKS / f"{time.monotonic_ns()}" / checkpoint.name
        try:
            links.mkdir(parents=True)
            for path in checkpoint.iterdir():
                os.link(path, links / path.name)
        except OSError:
            shutil.rmtree(links.parent, ignore_errors=True)
            return checkpoint
        return links

    def _remove_links(self, folder: Path | None) -> None:
        if folder and folder.is_relative_to(self._folder / _LINKS):
            shutil.rmtree(folder.parent, ignore_errors=True)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                self._copying, self._waiting = self._waiting, None
            assert self._copying
            self._copy(self._copying)
            self._remove_links(self._copying)
            with self._changed:
                self._copying = None
                self._changed.notify_all()

    def _copy(self, checkpoint: Path) -> None:
        """Copy a checkpoint; after an error try again, until it succeeds, is removed, or a newer one is offered."""
        pause_seconds = _FIRST_PAUSE_SECONDS
        while True:
            try:
                self._mirror.put_files(self._folder)
                self._mirror.put_checkpoint(checkpoint, self._superseded)
                return
            except Exception as error:  # whatever it is, the run goes on
                what = f"{checkpoint.name} could not be copied to {self._mirror.address} ({reason(error)})"
            if not (checkpoint / MANIFEST_FILE).exists():
                return _warn(f"{what}; it is no longer there")
            _warn(f"{what}; trying again in {pause_seconds:g} s")
            with self._changed:
                if self._changed.wait_for(lambda: self._waiting is not None, pause_seconds):
                    return
            pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)


def complete_mirror(config: Config) -> None:
    """Copy the newest checkpoint of a finished run, if its mirror lacks it; waits as the end of a run does."""
    newest, mirroring = newest_of_right_size(RunFolder(config).checkpoints), Mirroring.of(config)
    if newest and mirroring:
        mirroring.offer(newest)
        mirroring.finish(config.checkpoint.mirror_wait_seconds)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
