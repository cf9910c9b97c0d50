"""The mirror of a run, at an S3 server on this machine that fails on request."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest

from configs import tiny_config
from local_s3 import LocalS3
from megastruct.checkpoint.checksums import MANIFEST_FILE, checksum_of, manifest_text
from megastruct.checkpoint.intact import newest_intact
from megastruct.checkpoint.store import Keeping, checkpoint_folder, complete_checkpoints
from megastruct.config.load import dump_config
from megastruct.config.schema import Config
from megastruct.data.sources import fsspec_address
from megastruct.errors import UserError
from megastruct.run.mirror import Mirror
from megastruct.run.mirroring import Mirroring, complete_mirror
from megastruct.run.restore import Restore


@pytest.fixture(scope="module")
def server() -> Iterator[LocalS3]:
    with LocalS3() as server:
        yield server


@pytest.fixture(autouse=True)
def _environment(server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for key, value in server.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("megastruct.data.sources.patience._FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr("megastruct.run.mirroring._FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # of uploads, which botocore and s3fs retry for a while
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    yield
    server.recover()
    server.requests.clear()


@pytest.fixture
def config(server: LocalS3, tmp_path: Path) -> Config:
    """A run with two checkpoints, of steps 10 and 20."""
    config = config_of(tmp_path / "runs", server.bucket())
    for step in (10, 20):
        write_checkpoint(checkpoints_of(config), step)
    folder = checkpoints_of(config).parent
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "metrics.jsonl").write_text('{"step": 20}\n')
    (folder / "data_cache").mkdir()
    (folder / "data_cache" / "held_out.npy").write_bytes(b"tokens")
    (folder / "profile").mkdir()
    (folder / "profile" / "step_00000012_rank_0.json.gz").write_bytes(b"trace")
    (folder / "profile" / ".step_00000013_rank_0.json.gz").write_bytes(b"half a trace")
    (folder / ".lock").touch()
    return config


def config_of(folder: Path, bucket: str, **keys: Any) -> Config:
    return tiny_config(
        run={"name": "tiny", "folder": str(folder)},
        data={"kind": "tokens", "path": "unused", "patience_seconds": 20.0},
        checkpoint={"mirror": f"s3://{bucket}/runs", "keep": 2, "mirror_wait_seconds": 20.0, **keys},
    )


def elsewhere(config: Config, tmp_path: Path) -> Config:
    """The same run on another machine."""
    run = config.run.model_copy(update={"folder": str(tmp_path / "elsewhere")})
    return config.model_copy(update={"run": run})


def bucket_of(config: Config) -> str:
    assert config.checkpoint.mirror
    return config.checkpoint.mirror.split("/")[2]


def checkpoints_of(config: Config) -> Path:
    return Path(config.run.folder) / config.run.name / "checkpoints"


def write_checkpoint(root: Path, step: int) -> Path:
    folder = checkpoint_folder(root, step)
    folder.mkdir(parents=True)
    for name in ("__0_0.distcp", "__1_0.distcp", "state.json"):
        (folder / name).write_text(f"{name} of step {step}" * 1000)
    checksums = {path.name: checksum_of(path) for path in folder.iterdir()}
    (folder / MANIFEST_FILE).write_text(manifest_text(checksums))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    shown = {name: path for name, path in files.items() if not any(part.startswith(".") for part in name.parts)}
    return {name.as_posix(): path.read_bytes() for name, path in shown.items()}


def copy_all(config: Config) -> None:
    mirroring = Mirroring.of(config)
    assert mirroring
    for _, folder in complete_checkpoints(checkpoints_of(config)):
        mirroring.offer(folder)
        mirroring.finish(20)


def problem_of(action: Any) -> str:
    with pytest.raises(UserError) as raised:
        action()
    return str(raised.value)


# Copying --------------------------------------------------------------------------------------------------------------


def test_the_mirror_holds_what_the_folder_holds(server: LocalS3, config: Config) -> None:
    """Without locks; checksums are written last; the next copy removes the oldest, its checksums first."""
    copy_all(config)
    folder, bucket = checkpoints_of(config).parent, bucket_of(config)
    assert {f"runs/tiny/{name}" for name in contents(folder)} == set(server.keys(bucket))
    assert {name: server.get(bucket, f"runs/tiny/{name}") for name in contents(folder)} == contents(folder)
    written = [
        request.path for request in server.requests if request.method == "PUT" and "step_00000020" in request.path
    ]
    assert len(written) == 4 and written[-1].endswith(MANIFEST_FILE)
    assert not any("step_" in request.path for request in server.requests if request.method == "DELETE")

    write_checkpoint(checkpoints_of(config), 30)
    shutil.rmtree(checkpoint_folder(checkpoints_of(config), 10))
    copy_all(config)
    assert Mirror(config).complete_steps() == [20, 30]
    removed = [request.path for request in server.requests if request.method == "DELETE"]
    assert removed[-4].endswith(f"step_00000010/{MANIFEST_FILE}") and not any(
        "00010" in key for key in server.keys(bucket)
    )
    server.requests.clear()
    copy_all(config)  # which has nothing to do
    assert not [request for request in server.requests if "checkpoints/" in request.path and request.method == "PUT"]


def test_a_failing_mirror_delays_only_the_copy(server: LocalS3, config: Config, capsys: Any) -> None:
    server.fail("PUT .*distcp", 503, 3)
    copy_all(config)
    assert Mirror(config).complete_steps() == [10, 20]
    assert capsys.readouterr().err.count("could not be copied") == 3


def test_a_mirror_that_goes_down_and_comes_back(server: LocalS3, config: Config) -> None:
    server.fail("PUT .*__1_0.distcp", lambda: threading.Thread(target=server.go_down).start() or "reset", 1)
    timer = threading.Timer(0.6, server.come_up)
    timer.start()
    copy_all(config)
    timer.join()
    assert Mirror(config).complete_steps() == [10, 20]


def test_the_end_of_a_run_waits_for_a_limited_time(server: LocalS3, config: Config, capsys: Any) -> None:
    """What is half copied does not count; the next start of the finished run completes the copy."""
    server.fail("PUT .*__1_0.distcp", 403)
    complete_mirror(
        config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"mirror_wait_seconds": 0.3})})
    )
    assert "step_00000020 was not copied" in capsys.readouterr().err
    deadline = time.monotonic() + 60
    while not any("__0_0" in key for key in server.keys(bucket_of(config))):  # the thread goes on
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert Mirror(config).complete_steps() == []
    assert newest_intact(checkpoints_of(config)) == (checkpoint_folder(checkpoints_of(config), 20), [])
    # The first thread ends, and has completed nothing. It may be removing its files there itself.
    shutil.rmtree(checkpoints_of(config).parent / ".mirroring", ignore_errors=True)
    server.recover()
    complete_mirror(config)
    assert Mirror(config).complete_steps() == [20]


def test_a_checkpoint_that_is_removed_while_it_is_copied_is_copied_whole(server: LocalS3, config: Config) -> None:
    def remove() -> None:
        shutil.rmtree(checkpoint_folder(checkpoints_of(config), 20), ignore_errors=True)

    server.fail("PUT .*step_00000020/__0_0", remove, 1)
    copy_all(config)
    assert not checkpoint_folder(checkpoints_of(config), 20).exists()
    assert Mirror(config).complete_steps() == [10, 20]


def test_a_checkpoint_that_is_overtaken_is_left_out(server: LocalS3, config: Config) -> None:
    begun, gate = threading.Event(), threading.Event()
    server.fail("PUT .*step_00000010/__0_0", lambda: begun.set() or (gate.wait(20) and None), 1)
    mirroring = Mirroring.of(config)
    assert mirroring
    mirroring.offer(checkpoint_folder(checkpoints_of(config), 10))
    assert begun.wait(20)
    mirroring.offer(checkpoint_folder(checkpoints_of(config), 20))
    mirroring.offer(write_checkpoint(checkpoints_of(config), 30))
    gate.set()
    mirroring.finish(20)
    assert Mirror(config).complete_steps() == [10, 30]
    assert not list((checkpoints_of(config).parent / ".mirroring").iterdir())


def test_what_an_interrupted_copy_left_is_removed(server: LocalS3, config: Config) -> None:
    server.put(bucket_of(config), "runs/tiny/checkpoints/step_00000005/__0_0.distcp", b"half")
    copy_all(config)
    assert not any("step_00000005" in key for key in server.keys(bucket_of(config)))


def test_file_systems_without_hard_links(server: LocalS3, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.link", partial(_raise, OSError(1, "no links")))
    before = contents(checkpoints_of(config))
    copy_all(config)
    assert Mirror(config).complete_steps() == [10, 20] and contents(checkpoints_of(config)) == before


def _raise(error: Exception, *_: Any) -> None:
    raise error


def test_a_mirror_on_a_file_system(config: Config, tmp_path: Path) -> None:
    checkpoint = config.checkpoint.model_copy(update={"mirror": f"file://{tmp_path}/mirror"})
    config = config.model_copy(update={"checkpoint": checkpoint})
    Restore(config).checkpoint()
    copy_all(config)
    assert contents(tmp_path / "mirror" / "tiny") == contents(checkpoints_of(config).parent)
    there = elsewhere(config, tmp_path)
    restore(there)
    assert newest_intact(checkpoints_of(there))[0] == checkpoint_folder(checkpoints_of(there), 20)


# Coming back ----------------------------------------------------------------------------------------------------------


def restore(config: Config) -> None:
    restore = Restore(config)
    restore.files()
    restore.checkpoint()


def test_a_run_comes_back_to_an_empty_folder_once(server: LocalS3, config: Config, tmp_path: Path) -> None:
    """Two processes ask at the same time: one of them downloads the checkpoint, the newest alone, and no traces."""
    copy_all(config)
    there = elsewhere(config, tmp_path)
    server.requests.clear()
    threads = [threading.Thread(target=restore, args=(there,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {
        name: content
        for name, content in contents(checkpoints_of(config).parent).items()
        if "00010" not in name and not name.startswith("profile/")
    }
    assert contents(checkpoints_of(there).parent) == expected
    assert sum(request.method == "GET" and "__0_0" in request.path for request in server.requests) == 1


def test_an_older_folder_is_brought_up_to_date_and_a_newer_one_stays(config: Config, tmp_path: Path) -> None:
    copy_all(config)
    there = elsewhere(config, tmp_path)
    write_checkpoint(checkpoints_of(there), 15)
    restore(there)
    assert [step for step, _ in complete_checkpoints(checkpoints_of(there))] == [15, 20]
    write_checkpoint(checkpoints_of(there), 25)
    (checkpoints_of(there).parent / "metrics.jsonl").write_text('{"step": 25}\n')
    before = contents(checkpoints_of(there).parent)
    restore(there)
    assert contents(checkpoints_of(there).parent) == before


def test_a_damaged_copy_is_set_aside(server: LocalS3, config: Config, tmp_path: Path, capsys: Any) -> None:
    copy_all(config)
    key = "runs/tiny/checkpoints/step_00000020/__1_0.distcp"
    server.put(bucket_of(config), key, server.get(bucket_of(config), key)[::-1])
    there = elsewhere(config, tmp_path)
    restore(there)
    assert newest_intact(checkpoints_of(there))[0] == checkpoint_folder(checkpoints_of(there), 10)
    assert "another size or checksum" in capsys.readouterr().err
    assert Mirror(config).complete_steps() == [10]
    server.client.delete_object(Bucket=bucket_of(config), Key="runs/tiny/checkpoints/step_00000010/state.json")
    shutil.rmtree(there.run.folder)
    assert "every checkpoint of the mirror is damaged" in problem_of(lambda: restore(there))


@pytest.mark.parametrize("failure", [503, "cut", "reset"])
def test_a_download_survives_failures(server: LocalS3, config: Config, tmp_path: Path, failure: Any) -> None:
    copy_all(config)
    there = elsewhere(config, tmp_path)
    server.fail("GET .*distcp", failure, 3)
    restore(there)
    assert newest_intact(checkpoints_of(there))[0] == checkpoint_folder(checkpoints_of(there), 20)


def test_a_mirror_of_another_run_is_refused(config: Config, tmp_path: Path) -> None:
    copy_all(config)
    there = elsewhere(config, tmp_path)
    own = there.model_copy(update={"optimizer": there.optimizer.model_copy(update={"learning_rate": 0.5})})
    write_checkpoint(checkpoints_of(there), 15)
    (checkpoints_of(there).parent / "config.yaml").write_text(dump_config(own))
    before = contents(checkpoints_of(there).parent)
    assert "another config" in problem_of(lambda: restore(there))
    assert contents(checkpoints_of(there).parent) == before


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_a_mirror_that_cannot_be_used_is_named_before_training(
    server: LocalS3, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use(mirror: str) -> Any:
        checkpoint = config.checkpoint.model_copy(update={"mirror": mirror})
        return lambda: Restore(config.model_copy(update={"checkpoint": checkpoint}))

    assert "does not exist" in problem_of(use("s3://no-such-bucket/runs"))
    assert "pip install 'megastruct[gs]'" in problem_of(use("gs://bucket/runs"))
    assert "Protocol not known" in problem_of(use("weird://bucket/runs"))
    server.fail("PUT .*writable", 403)
    assert "rejects the request" in problem_of(lambda: Restore(config))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert "cannot be reached" in problem_of(lambda: Restore(config))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(ValueError, match="mirror"):
        config_of(tmp_path, "b", mirror="/a/folder")


def test_a_store_that_takes_connections_and_never_answers(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec_address, "_WRITE_SECONDS", 0.1)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        patience = config.data.model_copy(update={"patience_seconds": 0.2})
        mirror = Mirror(config.model_copy(update={"data": patience}))
        assert "the store has stopped answering" in problem_of(mirror.check_writable)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_the_rule_for_old_checkpoints() -> None:
    assert Keeping(2).outdated([30, 10, 20]) == [10]
    assert Keeping(2).outdated([10]) == []
