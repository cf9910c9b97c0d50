"""Ranks that are killed, stopped or hang in the middle of training: the others end in time, and name them."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from forked import Forked
from marks import soak
from megastruct import train
from megastruct.errors import Problem, UserError
from processes import Started, last_step

RUN = ("parallel.pp=2", "parallel.tp=2", "training.num_steps=3000", "evaluation.num_samples=0")
SILENCE = 3.0
LIMITS = (f"reliability.silence_seconds={SILENCE}", "reliability.collective_seconds=60")


def survivors(forked: Forked, lost: int) -> list[int]:
    return [rank for rank in range(len(forked.ranks)) if rank != lost]


def only_message(text: str) -> str:
    """It is said once, whoever says it."""
    messages = re.findall(r"(?<!collect2: )error: .*", text)  # not the linker's, which looks for what is not used
    assert len(messages) == 1, text
    return messages[0]


@pytest.mark.parametrize("lost", [0, 2])
def test_a_killed_rank_is_named_at_once(config: Path, tmp_path: Path, lost: int) -> None:
    """kill -9, with limits of which none could pass before."""
    with Forked(tmp_path, tmp_path / "runs" / "test", 4, config, *RUN) as forked:
        forked.wait_for_step(4)
        forked.signal(lost, signal.SIGKILL)
        start = time.monotonic()
        assert forked.codes(*survivors(forked, lost)) == [1, 1, 1]
        assert time.monotonic() - start < 20
        text = forked.text()
        found = only_message(text)
        assert f"rank {lost}" in found and "is lost: its process has ended" in found, text
        assert f"process {forked.ranks[lost].pid} on " in found, text
        assert "run the same command again to resume from the newest checkpoint" in text


@pytest.mark.parametrize(("lost", "margin"), [(0, 25.0), (3, 25.0), soak(0, 5.0)])
def test_a_stopped_rank_is_named_in_time(config: Path, tmp_path: Path, lost: int, margin: float) -> None:
    """Long before the limit of collectives; within seconds where the machine has nothing else to do."""
    with Forked(tmp_path, tmp_path / "runs" / "test", 4, config, *RUN, *LIMITS) as forked:
        forked.wait_for_step(2)
        forked.signal(lost, signal.SIGSTOP)
        start = time.monotonic()
        assert forked.codes(*survivors(forked, lost), seconds=40) == [1, 1, 1], forked.text()
        assert SILENCE / 2 < time.monotonic() - start < SILENCE + margin
        found = only_message(forked.text())
        assert f"rank {lost}" in found and "has been silent for 3 s: it is stopped" in found


@pytest.mark.soak
def test_a_run_that_was_stopped_as_a_whole_goes_on(config: Path, tmp_path: Path) -> None:
    """A suspended job, a closed laptop: nobody is silent because everybody was."""
    arguments = (*RUN, *LIMITS, "training.num_steps=20")
    with Forked(tmp_path, tmp_path / "runs" / "test", 4, config, *arguments) as forked:
        forked.wait_for_step(2)
        for rank in range(4):
            forked.signal(rank, signal.SIGSTOP)
        time.sleep(SILENCE + 2)
        for rank in range(4):
            forked.signal(rank, signal.SIGCONT)
        assert forked.codes() == [0, 0, 0, 0], forked.text()


@pytest.mark.parametrize("where", ["in a step", "between steps"])
def test_a_rank_that_hangs_is_named_with_its_place(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Its process lives and sends heartbeats; its main thread reads from a disk that does not answer."""

    def disk_that_does_not_answer() -> None:
        while True:
            time.sleep(0.1)

    method = {"in a step": "_timed", "between steps": "_train_step"}[where]
    original = getattr(train.Run, method)

    def hang(self: Any, *arguments: Any) -> Any:
        result = original(self, *arguments)
        if dist.get_rank() == 1 and self.step == 3:
            disk_that_does_not_answer()
        return result

    monkeypatch.setattr(train.Run, method, hang)
    arguments = ("parallel.pp=2", "reliability.collective_seconds=3", "logging.interval_steps=10")
    with Forked(tmp_path, tmp_path / "runs" / "test", 2, config, *arguments, "checkpoint.interval_steps=0") as forked:
        codes = forked.codes(seconds=60)
        text = forked.text()
        assert codes == [1, 1], text
        message = only_message(text)
        assert "rank 1 hangs: it never " in message and "disk_that_does_not_answer" in message, text


@pytest.mark.soak
def test_killed_below_the_launcher(config: Path, tmp_path: Path) -> None:
    """As users start it: the message reaches the terminal, and the code is a failure's."""
    run, arguments = tmp_path / "runs" / "test", (config, "parallel.dp=2", *LIMITS, "training.num_steps=3000")
    killed = Started(run, *arguments)
    killed.wait_for_step(5)
    killed.rank(1).kill()
    code, stderr = killed.end()
    assert code not in (0, 2, 75), stderr
    assert stderr.count("error: rank 1 (process ") == 1 and "is lost" in stderr, stderr


@pytest.mark.soak
def test_strangers_are_sent_away(config: Path, tmp_path: Path) -> None:
    """Whoever connects without the run's word can say nothing: not that a rank ends, nor in whose name."""
    arguments = ("parallel.pp=2", "training.num_steps=150", "evaluation.num_samples=0", "checkpoint.interval_steps=0")
    with Forked(tmp_path, tmp_path / "runs" / "test", 2, config, *arguments) as forked:
        forked.wait_for_step(1)
        listening = [c.laddr for c in psutil.Process(forked.ranks[0].pid).net_connections() if c.status == "LISTEN"]
        (port,) = {address.port for address in listening if address.ip == "::" and address.port != forked.port}
        for text in (b"1 0 9 nowhere\n", b"word 1 me\n1 0 9 nowhere\n", b"\xff" * 100_000 + b"\n", b""):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as link:
                link.sendall(text)
                if text:
                    with contextlib.suppress(ConnectionError):
                        assert link.recv(100) == b""
        assert last_step(forked.run) < 150
        assert forked.codes() == [0, 0], forked.text()


def test_an_error_of_one_rank_is_said_by_it_alone(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others end with its exit code, and nobody calls it lost."""
    original = train.Run._train_step

    def fail(self: Any, now: Any) -> float:
        if dist.get_rank() == 0 and self.step == 3:
            raise UserError(Problem("data.path", "a broken file"))
        return original(self, now)

    monkeypatch.setattr(train.Run, "_train_step", fail)
    with Forked(tmp_path, tmp_path / "runs" / "test", 4, config, *RUN) as forked:
        assert forked.codes(seconds=30) == [2, 2, 2, 2], forked.text()
        assert only_message(forked.text()) == "error: data.path: a broken file"


@pytest.mark.soak
def test_stopped_below_the_launcher(config: Path, tmp_path: Path) -> None:
    """The launcher gives the stopped rank half a minute."""
    run = tmp_path / "runs" / "test"
    started = Started(run, config, "parallel.dp=2", *LIMITS, "training.num_steps=3000")
    started.wait_for_step(2)
    rank = started.rank(1)
    rank.suspend()
    start = time.monotonic()
    started.wait_for(lambda: "has been silent" in started.stderr())
    assert time.monotonic() - start < SILENCE + 5
    code, stderr = started.end()
    assert code not in (0, 2, 75), stderr
    assert not rank.is_running() or rank.status() == "zombie"
    assert stderr.count("error: rank 1 (process ") == 1, stderr
