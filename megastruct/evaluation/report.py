"""Scores as an aligned table and as JSON."""

from __future__ import annotations

import json
import math
from typing import Any

from megastruct.evaluation.loss import Score, sum_of
from megastruct.evaluation.sources import OVERALL

HEADER = ("source", "tokens", "loss", "perplexity", "bits per byte")


def table(scores: dict[str, Score]) -> str:
    """A line for each source, and one for all together if there are several."""
    lines = [HEADER, *(_cells(name, score) for name, score in scores.items())]
    if len(scores) > 1:
        lines.append(_cells(OVERALL, sum_of(scores.values())))
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    )


def as_json(model: dict[str, Any], scores: dict[str, Score]) -> str:
    """One JSON object: what `model` says of the model, `sources` by name, and `overall`. NaN and infinity are null."""
    sources = {name: _values(score) for name, score in scores.items()}
    return json.dumps({**model, "sources": sources, OVERALL: _values(sum_of(scores.values()))}, indent=1)


def _cells(name: str, score: Score) -> tuple[str, ...]:
    bits = score.bits_per_byte
    return (
        name,
        f"{score.num_tokens:,}",
        f"{score.loss:.4f}",
        f"{score.perplexity:,.2f}",
        "-" if bits is None else f"{bits:.4f}",
    )


def _values(score: Score) -> dict[str, float | None]:
    values = {
        "tokens": score.num_tokens,
        "bytes": score.num_bytes,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }
    return {key: value if value is not None and math.isfinite(value) else None for key, value in values.items()}
