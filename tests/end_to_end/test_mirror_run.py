"""A run that is lost with its machine and continues from its mirror."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from forked import Forked, train_forked
from local_s3 import LocalS3
from processes import losses, read_metrics


def test_a_run_continues_from_its_mirror_on_another_machine(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy of the last checkpoint is cut off; the run continues bit for bit from the one before."""
    with LocalS3() as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        bucket = server.bucket()
        arguments = (config, "parallel.dp=2", f"checkpoint.mirror=s3://{bucket}/runs")
        run = tmp_path / "runs" / "test"
        train_forked(tmp_path, run, 2, *arguments)
        expected = losses(run)
        shutil.rmtree(run)
        prefix = "runs/test/checkpoints/"
        assert {key.split("/")[3] for key in server.keys(bucket) if key.startswith(prefix)} == {
            "step_00000009",
            "step_00000012",
        }
        server.client.delete_object(Bucket=bucket, Key=f"{prefix}step_00000012/checksums.json")

        other = tmp_path / "other" / "test"
        train_forked(tmp_path, other, 2, *arguments, f"run.folder={other.parent}")
        assert losses(other) == expected
        assert [record["step"] for record in read_metrics(other)] == list(range(1, 13))
        last = sorted((other / "checkpoints").iterdir())[-1]
        for path in last.iterdir():
            assert server.get(bucket, f"{prefix}{last.name}/{path.name}") == path.read_bytes()

    third = tmp_path / "third" / "test"
    with Forked(tmp_path, third, 1, *arguments[:1], arguments[2], f"run.folder={third.parent}") as forked:
        assert forked.codes() == [2], forked.text()
        assert forked.text().count("checkpoint.mirror: ") == 1 and "Traceback" not in forked.text()
