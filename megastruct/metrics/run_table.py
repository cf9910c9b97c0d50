"""A table of runs, as in Table 1 of arXiv 2406.16450: what each costs and what it reaches."""

from __future__ import annotations

from collections.abc import Sequence

from megastruct.metrics.perplexity import perplexity
from megastruct.metrics.records import FLOPS, PARAMETERS, TOKENS, VALIDATION, Run
from megastruct.planning.cost import ffn_parameters

UNKNOWN = "–"
COLUMNS = ("run", "parameters", "FFN parameters", "tokens", "training FLOPs", "GPU hours", "loss", "perplexity")


def run_table(runs: Sequence[Run]) -> str:
    """The runs as a Markdown table; what is unknown is a dash.

    The loss is the last one on held-out text, and the tokens, FLOPs and hours are those up to it.
    """
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(_row(run) for run in runs)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(run: Run) -> tuple[str, ...]:
    record = run.last_record(VALIDATION)
    loss = run.value(record, VALIDATION)
    return (
        run.name,
        _millions(run.value(record, PARAMETERS)),
        _millions(None if run.config is None else ffn_parameters(run.config)),
        _millions(run.value(record, TOKENS)),
        _number(run.value(record, FLOPS), "{:.3g}"),
        _number(run.value(record, "device_hours"), "{:.3g}"),
        _number(loss, "{:.4f}"),
        _number(None if loss is None else perplexity(loss), "{:.2f}"),
    )


def _millions(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value / 1e9:.2f} B" if value >= 1e9 else f"{value / 1e6:.2f} M"


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else form.format(value)
