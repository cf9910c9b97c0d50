"""One save at a time, from a copy; its error is raised where it is waited for."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megastruct.checkpoint.background import BackgroundSaver
from megastruct.errors import Problem, UserError
from ranks import run_ranks


def two_saves() -> list[Any]:
    """What the saves of two steps have written; both end after training went on, which changes the tensor at once."""
    saver, written = BackgroundSaver(), []
    weight = torch.zeros(3)

    def write(group: Any, copies: dict[str, torch.Tensor], started: threading.Event) -> None:
        written.append("training goes on" if started.wait(20) else "training waits")
        time.sleep(0.5)  # a next save that does not wait would come meanwhile
        total = copies["weight"].clone()
        dist.all_reduce(total, group=group)
        written.append(total.tolist())

    for step in (1, 2):
        weight.fill_(step)
        copies = saver.host_copies({"weight": weight})
        started = threading.Event()
        saver.start(lambda group, copies=copies, started=started: write(group, copies, started))
        started.set()
        weight.fill_(-1)
        dist.all_reduce(torch.ones(1))  # training's own collectives meanwhile
    saver.wait()
    return written


def test_the_next_save_waits_and_training_does_not() -> None:
    expected = ["training goes on", [2.0] * 3, "training goes on", [4.0] * 3]
    assert run_ranks(2, two_saves) == [expected, expected]


def failing_save() -> str:
    saver = BackgroundSaver()

    def write(_: Any) -> None:
        raise UserError(Problem("disk", "full"))

    saver.start(write)
    with pytest.raises(UserError, match="disk: full"):
        saver.host_copies({})
    saver.wait()  # it was said
    return "said once"


def test_an_error_is_raised_once() -> None:
    assert run_ranks(1, failing_save) == ["said once"]
