"""What a run shows while it trains: lines for logs, a bar for terminals."""

from __future__ import annotations

import re

import pytest

from megastruct.config.schema import LoggingConfig
from megastruct.metrics.progress import Progress, style_of
from megastruct.metrics.stragglers import Parts, slowest
from megastruct.planning.words import count, duration, size

RECORD = {"loss": 2.5, "learning_rate": 3e-4, "grad_norm": None, "tokens_per_second": 12345.6, "memory_bytes": 1.0}


def test_a_line_per_record(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(20, 5, "lines")
    progress.update(2.5, 1.0)
    progress.record(10, RECORD)
    progress.record(10, {"validation_loss": 2.0})
    progress.close()
    [line] = capsys.readouterr().err.splitlines()
    shown = r"step 10/20  loss 2.5000  learning rate 0.0003  12,346 tokens/s  left 0:00:00"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  " + shown, line), line


def test_a_line_names_a_slow_rank(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(20, 5, "lines")
    progress.record(10, RECORD | slowest([Parts(1.0, 0.0, 0.5), Parts(1.0, 0.75, 0.0)]))
    progress.close()
    assert "12,346 tokens/s  slowest rank 1: data wait 0.75 s, median 0 s  left" in capsys.readouterr().err


def test_a_bar_has_no_lines_and_off_has_neither(capsys: pytest.CaptureFixture[str]) -> None:
    for style, shown in (("bar", True), ("off", False)):
        progress = Progress(20, 0, style)  # type: ignore[arg-type]
        progress.update(2.5, 1.0)
        progress.record(1, RECORD)
        progress.close()
        text = capsys.readouterr().err
        assert ("training" in text) == shown and "learning rate" not in text


def test_the_style_follows_the_config_and_the_terminal() -> None:
    """Here stderr is no terminal."""
    assert [style_of(LoggingConfig(style=style)) for style in ("auto", "bar", "lines")] == ["lines", "bar", "lines"]
    assert style_of(LoggingConfig(progress_bar=False)) == "off"
    assert style_of(LoggingConfig(progress_bar=False, style="lines")) == "lines"


def test_numbers_as_people_read_them() -> None:
    assert [count(number) for number in (999, 27_400, 1.5e6, 2.5e9, 3e12)] == [
        *("999", "27.4 k", "1.5 M", "2.50 G", "3.00 T"),
    ]
    assert [size(number) for number in (2**10, 1.5 * 2**20, 2**30, 2**41)] == ["1 KiB", "1.5 MiB", "1.0 GiB", "2.0 TiB"]
    assert [duration(seconds) for seconds in (59.6, 3661, 90_000)] == ["0:01:00", "1:01:01", "1 days 1:00:00"]
