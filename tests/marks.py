"""Which cases of a matrix run always, which with the soak tests only, and which on GPUs only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def soak(*values: Any) -> Any:
    """A case that runs with the soak tests only."""
    return pytest.param(*values, marks=pytest.mark.soak)


def always(cases: Iterable[Any], chosen: Iterable[Any]) -> list[Any]:
    """The cases, of which only the chosen ones run always; a chosen one that is no case is an error."""
    cases, chosen = list(cases), list(chosen)
    assert all(case in cases for case in chosen), chosen
    return [case if case in chosen else soak(*(case if isinstance(case, tuple) else (case,))) for case in cases]
