"""The table of device peaks knows devices by whole words."""

from __future__ import annotations

import pytest

from megastruct.metrics.devices import peak_of_name


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A1000", None),
        ("Tesla V100", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_of_name(name) == peak
