"""Means over the steps since the last record."""

from __future__ import annotations

import pytest

from megastruct.metrics.throughput import Throughput


def test_a_window_over_the_end_of_the_guided_phase_counts_its_guided_steps() -> None:
    throughput = Throughput(tokens_per_step=100, num_devices=2, peak_tflops=None)
    for share in (1.0, 0.5, None, None):
        with throughput.step():
            throughput.waited_for_data(0.25)
        if share is not None:
            throughput.guided(share)
    assert throughput.guide_share == 0.375
    values = throughput.read(1e12)
    assert values["data_wait_seconds"] == 0.25 and values["mfu"] is None
    tokens_per_second = values["tokens_per_second"]
    assert tokens_per_second and values["tflops_per_device"] == pytest.approx(tokens_per_second / 2)
    assert throughput.guide_share == 0.0
