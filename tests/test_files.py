"""Files that are whole or absent whenever their writer is killed, and locks between real processes."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megastruct.data.cache import cached_array
from megastruct.files import FileLock, LockHeldError, NewFile, write_atomically

ROOT = Path(__file__).parents[1]


def python(script: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """A process that speaks by lines of its stdout, and can be spoken to."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **pipes, **options)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


# Writing ----------------------------------------------------------------------------------------------------------


def test_a_writer_that_is_killed_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_atomically(path, "old")
    script = (
        "import sys; from pathlib import Path; from megastruct.files import NewFile\n"
        "file = NewFile(Path(sys.argv[1])); file.write(b'n' * 3_000_000); print('written', flush=True); input()"
    )
    process = python(script, path)
    assert line_of(process) == "written"
    kill(process)
    assert path.read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == [".x.json.writing", "x.json"]
    write_atomically(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_writer_that_is_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    script = (
        "import sys; from pathlib import Path; from megastruct.files import write_atomically\n"
        "for number in range(10**9):\n"
        "    write_atomically(Path(sys.argv[1]), str(number % 10) * 300_000)\n"
        "    print(number, flush=True) if number < 2 else None"
    )
    seconds = random.Random(0)
    for _ in range(8):
        process = python(script, path)
        line_of(process), line_of(process)
        time.sleep(seconds.uniform(0.0, 0.1))
        kill(process)
        content = path.read_text()
        assert len(content) == 300_000 and len(set(content)) == 1


def test_an_error_keeps_the_old_content_and_names_the_file(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for a full disk: the system says so without a name."""
    path = tmp_path / "x"
    write_atomically(path, "old")
    script = (
        "import sys; from pathlib import Path; from megastruct.files import write_atomically\n"
        "try: write_atomically(Path(sys.argv[1]), bytes(5_000_000))\n"
        "except OSError as error: print(error.errno, error.filename)"
    )
    process = python(script, path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, 1_000)))
    assert process.communicate()[0].strip() == f"{errno.EFBIG} {path}"
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]

    with pytest.raises(ZeroDivisionError), NewFile(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["folder", "none/x"])
def test_a_place_that_cannot_be_taken_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught:
        write_atomically(tmp_path / name, b"x")
    assert caught.value.filename == str(tmp_path / name)
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"] and not list((tmp_path / "folder").iterdir())


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        of_folder = os.path.samestat(os.fstat(descriptor), tmp_path.stat())
        calls.append("sync folder" if of_folder else f"sync {os.fstat(descriptor).st_size} bytes")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        calls.append(f"{source.name} -> {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_atomically(tmp_path / "x", "größer")
    assert calls == ["sync 8 bytes", ".x.writing -> x", "sync folder"]
    assert (tmp_path / "x").read_bytes() == "größer".encode()


# Locks ------------------------------------------------------------------------------------------------------------

HOLDER = (
    "import sys; from pathlib import Path; from megastruct.files import FileLock\n"
    "with FileLock(Path(sys.argv[1]), **{name: True for name in sys.argv[2:]}):\n"
    "    print('held', flush=True); input()"
)


@pytest.mark.parametrize("holder", [[], ["shared"]])
@pytest.mark.parametrize("shared", [False, True])
def test_who_may_be_beside_whom(tmp_path: Path, holder: list[str], shared: bool) -> None:
    path = tmp_path / ".lock"
    process = python(HOLDER, path, *holder)
    assert line_of(process) == "held"
    if holder and shared:
        FileLock(path, shared=True).release()
    else:
        with pytest.raises(LockHeldError):
            FileLock(path, shared=shared)
    kill(process)
    with FileLock(path, shared=shared):  # the system has freed it
        pass
    assert path.exists()


def test_one_that_waits_gets_the_lock_when_the_holder_is_killed(tmp_path: Path) -> None:
    holder = python(HOLDER, tmp_path / ".lock")
    assert line_of(holder) == "held"
    waiting = python(HOLDER, tmp_path / ".lock", "wait")
    time.sleep(0.3)
    killed = time.monotonic()
    kill(holder)
    assert line_of(waiting) == "held" and time.monotonic() - killed < 20
    with pytest.raises(LockHeldError):
        FileLock(tmp_path / ".lock")
    kill(waiting)


def test_a_temporary_lock_that_was_waited_for_is_held_on_the_file_that_is_there(tmp_path: Path) -> None:
    """The holder removes the file on which the other one waits: a lock on that one would keep nobody out."""
    path = tmp_path / ".lock"
    lock = FileLock(path, temporary=True)
    waiting = python(HOLDER, path, "wait", "temporary")
    time.sleep(1.0)  # until it waits
    lock.release()
    assert line_of(waiting) == "held"
    with pytest.raises(LockHeldError):
        FileLock(path, temporary=True)
    waiting.communicate("\n")
    assert not path.exists()


def refuse_flock(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
@pytest.mark.parametrize("temporary", [False, True])
def test_on_a_file_system_without_locks_there_is_a_warning_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, temporary: bool
) -> None:
    refuse_flock(monkeypatch, number)
    with FileLock(tmp_path / ".lock", temporary=temporary) as lock:
        assert str(tmp_path) in lock.warning and os.strerror(number) in lock.warning
    assert (tmp_path / ".lock").exists() != temporary
    monkeypatch.undo()
    with FileLock(tmp_path / ".lock") as lock:
        assert not lock.warning


def test_a_lock_that_fails_otherwise_is_not_taken_for_one_that_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_flock(monkeypatch, errno.EIO)
    with pytest.raises(OSError) as caught:
        FileLock(tmp_path / ".lock")
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(tmp_path / ".lock"))


def test_a_cache_without_locks_finds_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_flock(monkeypatch, errno.ENOLCK)
    assert cached_array(tmp_path / "cache", "x", lambda: np.arange(3)).tolist() == [0, 1, 2]
    assert not list((tmp_path / "cache").glob("*.npy"))
