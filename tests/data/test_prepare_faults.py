"""prepare_data when something goes wrong beneath it: a full disk, a changing shard, monstrous documents, any kill."""

import contextlib
import errno
import fcntl
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megastruct.commands import prepare as prepare_data
from megastruct.data.preparation import shard as prepare_shard
from megastruct.data.preparation import workers as prepare_workers
from megastruct.data.preparation.inspect import verify
from megastruct.data.sources.reading import read_patiently
from megastruct.data.tokens.manifest import load_manifest
from test_prepare import ROOT, arguments_for, contents, refused, start
from tiny_data import make_texts, write_parquet

TOOL = str(ROOT / "tools" / "prepare_data.py")


def run_tool(arguments, before=(), **options) -> subprocess.CompletedProcess:
    command = [*before, sys.executable, TOOL, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **options)


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_one_bad_line_is_counted_and_not_fatal(tmp_path, tokenizer_path, capsys):
    good = [json.dumps({"content": f"river stone {i}"}) for i in range(10)]
    (tmp_path / "text").mkdir()
    write_lines(tmp_path / "text" / "a.jsonl", [*good[:3], '{"content": "cut', "[1, 2]", *good[3:], "{" * 10_000])
    prepare_data.main([*arguments_for(tmp_path / "text", tmp_path / "out", tokenizer_path)])
    manifest = load_manifest(tmp_path / "out")
    assert manifest.skipped_documents["unparsable"] == 3
    assert manifest.totals.train.num_documents + manifest.totals.validation.num_documents == 10
    assert "skipped 3 unparsable" in capsys.readouterr().out


def test_progress_of_a_compressed_shard_ends_at_its_size(tmp_path, tokenizer_path, capsys, monkeypatch):
    """Ten times the text: the remaining time is told from what is read of the shard's bytes."""
    (tmp_path / "text").mkdir()
    path = tmp_path / "text" / "a.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(f'{{"content": "river stone light {i % 10}"}}\n' for i in range(2000))
    read = []
    add = prepare_workers._Progress.add
    monkeypatch.setattr(prepare_workers._Progress, "add", lambda self, *part: read.append(part[2]) or add(self, *part))
    prepare_data.main([*arguments_for(tmp_path / "text", tmp_path / "out", tokenizer_path)])
    assert len(read) > 10 and sum(read) == path.stat().st_size


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_file_that_may_not_grow_ends_all_with_one_message(text_folder, tokenizer_path, tmp_path, num_workers):
    """RLIMIT_FSIZE stands for a quota; what is finished stays, and the same command finishes the rest."""
    output, text = tmp_path / "out", shutil.copytree(text_folder, tmp_path / "text")
    write_parquet(text / "shard-3.parquet", [text for text in make_texts(3) if text] * 400)
    arguments = arguments_for(text, output, tokenizer_path, "--max-shard-tokens", "400000")
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))  # noqa: E731
    result = run_tool([*arguments, "--workers", str(num_workers)], preexec_fn=limited)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "cannot be written" in result.stderr and "File too large" in result.stderr and str(output) in result.stderr
    assert result.stderr.count("try:") == 1
    finished = list(output.glob("progress/0*.json"))
    if num_workers == 1:
        assert len(finished) == 3 and not list(output.rglob("*.writing"))
    files = {path: path.stat().st_mtime_ns for path in output.glob("train/0000[012]-*.bin") if num_workers == 1}
    prepare_data.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    prepare_data.main(arguments_for(text, tmp_path / "again", tokenizer_path, "--max-shard-tokens", "400000"))
    assert contents(output) == contents(tmp_path / "again")


def can_mount() -> bool:
    if not shutil.which("unshare"):
        return False
    return not subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode


@pytest.mark.skipif(not can_mount(), reason="needs user namespaces to mount a small disk")
def test_a_full_disk_is_one_message(text_folder, tokenizer_path, tmp_path):
    """A disk of 64 kB, in a namespace of its own; then the same command with room."""
    script = (
        "mount -t tmpfs -o size=64k none $1 && shift && "
        "$@; code=$?; mount -o remount,size=8m $DISK && $@ && cat $DISK/out/manifest.json; exit $code"
    )
    disk = tmp_path / "disk"
    disk.mkdir()
    arguments = arguments_for(text_folder, disk / "out", tokenizer_path)
    before = ("env", f"DISK={disk}", "unshare", "-Urm", "sh", "-c", script, "sh", str(disk))
    result = run_tool(arguments, before)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "No space left on device" in result.stderr and result.stderr.count("try:") == 1
    assert json.loads(result.stdout[result.stdout.index("{") :])["totals"]["train"]["num_tokens"] > 1000


def test_a_folder_that_may_not_be_written_is_a_message(text_folder, tokenizer_path, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    error = refused(arguments_for(text_folder, tmp_path / "file" / "out", tokenizer_path), capsys)
    assert "cannot be written" in error and str(tmp_path / "file") in error


def test_a_file_system_without_locks_is_not_another_run(text_folder, tokenizer_path, tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    prepare_data.main(arguments_for(text_folder, tmp_path / "out", tokenizer_path))
    found = capsys.readouterr()
    assert found.err.startswith(f"warning: {tmp_path / 'out'} is on a file system without file locks")
    assert "done: " in found.out and not (tmp_path / "out" / ".lock").exists()


def test_a_finished_folder_is_reported_before_it_is_locked(text_folder, tokenizer_path, tmp_path, capsys, monkeypatch):
    arguments = arguments_for(text_folder, tmp_path / "out", tokenizer_path)
    prepare_data.main(arguments)
    monkeypatch.setattr(fcntl, "flock", lambda *_: pytest.fail("the folder was locked"))
    prepare_data.main(arguments)
    assert "already done: " in capsys.readouterr().out


def test_a_shard_that_changes_while_it_is_read_is_refused_and_read_again(
    text_folder, tokenizer_path, tmp_path, capsys, monkeypatch
):
    text, output = shutil.copytree(text_folder, tmp_path / "text"), tmp_path / "out"
    changing = text / "shard-2.parquet"

    def change_after_reading(shard, *arguments, **options):
        yield from read_patiently(shard, *arguments, **options)
        if shard.uri == str(changing):
            os.utime(changing, ns=(1, 1))  # the same size: only the time tells

    with monkeypatch.context() as patch:
        patch.setattr(prepare_shard, "read_patiently", change_after_reading)
        error = refused(arguments_for(text, output, tokenizer_path), capsys)
    assert "shard-2.parquet" in error and "changed" in error and "shard-1" not in error
    assert not (output / "progress" / "00002.json").exists() and (output / "progress" / "00005.json").exists()
    # between two calls: the record of a shard that changed does not count
    os.utime(text / "shard-5.parquet", ns=(2, 2))
    (output / "train" / "00005-077.bin").write_bytes(b"left by a run that was killed")
    prepare_data.main(arguments_for(text, output, tokenizer_path))
    assert "4 of 6 shards are done" in capsys.readouterr().out
    prepare_data.main(arguments_for(text, tmp_path / "again", tokenizer_path))
    assert contents(output) == contents(tmp_path / "again")


def test_monstrous_documents_and_memory(tokenizer_path, tmp_path):
    """A document of 50 MB and one of a single repeated character: their tokens come out whole, in bounded memory."""
    (tmp_path / "text").mkdir()
    words = "river stone light garden "
    long = words * (50_000_000 // len(words))
    write_parquet(tmp_path / "text" / "a.parquet", ["winter", long, "a" * 5_000_000, " " * 5_000_000, "letter"])
    arguments = arguments_for(tmp_path / "text", tmp_path / "out", tokenizer_path, "--max-shard-tokens", "3000000")
    # Told by a process between: Linux counts the memory of the process that starts another as the other's.
    script = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    script += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    result = run_tool(arguments, (sys.executable, "-c", script))
    assert result.returncode == 0 and int(result.stdout.splitlines()[-1]) < 1_000_000, result  # kB
    manifest = load_manifest(tmp_path / "out")
    assert verify(tmp_path / "out", manifest) == []
    assert manifest.skipped_documents["empty"] == 1
    assert manifest.totals.train.num_documents + manifest.totals.validation.num_documents == 4
    assert manifest.totals.train.num_tokens + manifest.totals.validation.num_tokens > 10_000_000


# The system counts what a process had in memory before it became another program, so a small process starts the tool:
# this one has held all the text.
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(status, usage.ru_maxrss)
"""


@pytest.mark.soak
def test_memory_of_a_worker_does_not_grow_with_the_shard(tokenizer_path, tmp_path):
    peaks = []
    for copies in (200, 4000):
        text = tmp_path / str(copies)
        text.mkdir()
        write_parquet(text / "a.parquet", [text for text in make_texts(1) if text] * copies, row_group_size=10**9)
        arguments = arguments_for(text, tmp_path / f"out{copies}", tokenizer_path, "--max-shard-tokens", "1000000")
        result = run_tool(arguments, (sys.executable, "-c", MEASURE))
        status, peak = map(int, result.stdout.split())
        assert status == 0, result.stderr
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 10_000  # kB, for 20 times the text
    assert (tmp_path / "out4000" / "manifest.json").stat().st_size > 0


@pytest.mark.soak
def test_killed_at_many_moments(tokenizer_path, tmp_path):
    """Killed again and again at odd moments, with one and with two workers in turn, until it is finished."""
    text, output = tmp_path / "text", tmp_path / "out"
    text.mkdir()
    for shard in range(12):
        write_parquet(text / f"{shard}.parquet", [text for text in make_texts(shard) if text] * 100)
    prepare_data.main(arguments_for(text, tmp_path / "undisturbed", tokenizer_path))
    rng = np.random.default_rng(0)
    for attempt in range(40):
        process = start([*arguments_for(text, output, tokenizer_path), "--workers", str(1 + attempt % 2)])
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=rng.uniform(0.6, 1.6))
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read()
            break
        process.kill()
        process.wait()
        time.sleep(0.3)  # for its workers to see it
    else:
        prepare_data.main(arguments_for(text, output, tokenizer_path))
    assert attempt >= 3
    assert contents(output) == contents(tmp_path / "undisturbed")
    assert Path(output / "manifest.json").is_file()
