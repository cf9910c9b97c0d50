"""What a run shows while it trains: a progress bar, or a line per record for logs."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Literal

from tqdm import tqdm

from megastruct.config.schema import LoggingConfig
from megastruct.metrics.stragglers import notable
from megastruct.planning.words import duration

Style = Literal["bar", "lines", "off"]


def style_of(logging: LoggingConfig) -> Style:
    """The style for this process's stderr: a bar where it is a terminal, unless the config says otherwise."""
    if logging.style != "auto":
        return logging.style
    if not logging.progress_bar:
        return "off"
    return "bar" if sys.stderr.isatty() else "lines"


class Progress:
    """Shows step, loss, tokens/s and the time left on stderr. Messages are printed in between."""

    def __init__(self, total_steps: int, first_step: int, style: Style) -> None:
        self._style, self._total = style, total_steps
        self._first, self._start = first_step, time.monotonic()
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            desc="training",
            disable=style != "bar",
            # If stderr is not a terminal, every refresh prints a line, so refresh seldom.
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
        )

    def update(self, loss: float, tokens_per_second: float) -> None:
        """Advance by one step."""
        self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        self._bar.update()

    def record(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """In the style `lines`, show a record of the metrics, unless it is one of a validation alone."""
        loss, speed = metrics.get("loss"), metrics.get("tokens_per_second")
        if self._style != "lines" or loss is None:
            return
        left = (self._total - step) * (time.monotonic() - self._start) / max(1, step - self._first)
        parts = [f"step {step}/{self._total}", f"loss {loss:.4f}"]
        parts += [f"learning rate {metrics['learning_rate']:.3g}"] if metrics.get("learning_rate") is not None else []
        parts += [f"gradient norm {metrics['grad_norm']:.3g}"] if metrics.get("grad_norm") is not None else []
        parts += [f"{speed:,.0f} tokens/s"] if speed is not None else []
        parts += [straggler] if (straggler := notable(metrics)) else []
        self.say(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {'  '.join(parts)}  left {duration(left)}")

    def go_back(self, step: int) -> None:
        """Set the bar back to `step`."""
        self._first, self._start = step, time.monotonic()
        self._bar.n = step
        self._bar.refresh()

    def say(self, text: str) -> None:
        """Print a message above the bar."""
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        """End the bar."""
        self._bar.close()
