"""A run that trains on text from the hub, as a user starts it: the losses of the same files in a folder."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from local_hub import LocalHub
from processes import Corpus, Started, losses

TEXT = ("data.kind=text", "data.validation_fraction=0.1", "data.num_streams=2", "parallel.dp=2")


@pytest.mark.soak
def test_a_run_on_the_hub_is_the_run_on_a_folder(config: Path, tmp_path: Path, corpus: Corpus) -> None:
    """Killed, and resumed without its cache when the dataset has another commit: listed once by each start, the second
    time at the commit that the run has on record."""
    runs = tmp_path / "runs"
    arguments = (config, *TEXT, f"data.tokenizer={corpus.tokenizer}", "training.num_steps=40")
    local = Started(runs / "local", *arguments, f"data.path={corpus.text}", "run.name=local")
    assert local.end()[0] == 0, local.stderr()
    with LocalHub() as hub:
        hub.commit("org/name", {path.name: path.read_bytes() for path in corpus.text.iterdir()})
        extra = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "0"}
        arguments = (*arguments, "data.path=org/name", "run.name=hub")
        started = Started(runs / "hub", *arguments, extra=extra)
        started.wait_for_step(7)
        started.signal_all(signal.SIGKILL)
        started.process.wait()
        assert len(losses(runs / "hub")) < 40
        shutil.rmtree(runs / "hub" / "data_cache")
        hub.commit("org/name", {"other.jsonl": b'{"content": "something else"}'})
        resumed = Started(runs / "hub", *arguments, extra=extra)
        assert resumed.end()[0] == 0, resumed.stderr()
        assert sum("/api/datasets/" in request.path for request in hub.requests) == 2 * 2
    assert losses(runs / "hub") == losses(runs / "local")
