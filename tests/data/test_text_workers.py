"""Text that is tokenised ahead: the same samples with any number of processes, and what happens when a source fails."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from huggingface_hub import errors as hub_errors

from megastruct.data import open_tokenizer
from megastruct.data.sources.reading import read_patiently
from megastruct.data.sources.shards import TextShard
from megastruct.data.sources.storages import storage_of
from megastruct.data.text import chunks as text_chunks
from megastruct.data.text.ahead import open_chunks
from megastruct.data.text.processes import CHUNKS_AHEAD
from megastruct.data.text.stream import START, TextSource
from megastruct.errors import UserError
from test_readers import make_readers, merged_cursor, open_tiny, run_step
from tiny_data import make_texts, write_parquet

ROOT = Path(__file__).parents[2]


class Owner:
    """Something for chunks to live as long as."""


def source_of(shards, tokenizer_path, patience_seconds=60.0) -> TextSource:
    return TextSource(shards, open_tokenizer(tokenizer_path), 0.0, 0, 1, patience_seconds)


def shard_at(path) -> TextShard:
    return TextShard(str(path), path.name, path.stat().st_size, text_column="content")


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def worker_of(chunks):
    return next(iter(chunks.values())).signs


@pytest.mark.parametrize("before, after", [(0, 2), (2, 0), (1, 3)])
def test_order_goes_on_with_another_number_of_workers_and_another_layout(text_folder, tokenizer_path, before, after):
    def readers_of(num_workers, dp_size, micro_batch_size, **options):
        data = open_tiny("text", text_folder, tokenizer_path, num_workers=num_workers)
        return make_readers(data, dp_size, micro_batch_size, **options)

    plain = readers_of(0, 1, 12)
    expected = [sample for _ in range(16) for sample in run_step(plain, 1, 12)]
    readers = readers_of(before, 2, 3)
    got = [sample for _ in range(7) for sample in run_step(readers, 2, 3)]
    cursor = merged_cursor(readers)
    readers = readers_of(after, 1, 4, cursor=cursor, start_sample=7 * 12)
    got += [sample for _ in range(9) for sample in run_step(readers, 1, 4)]
    assert got == expected
    np.testing.assert_array_equal(merged_cursor(readers), plain[0].cursor())


def test_a_worker_is_ahead_by_so_many_chunks_and_no_more(tmp_path, tokenizer_path):
    write_parquet(tmp_path / "a.parquet", [text for text in make_texts(0) if text] * 20)
    owner = Owner()
    chunks = open_chunks(owner, [source_of([shard_at(tmp_path / "a.parquet")], tokenizer_path)], {(0, 0): START}, 1)
    worker, stream = worker_of(chunks), chunks[0, 0]
    for _ in range(5):  # taken slowly: full again after each, and never fuller
        wait_for(lambda: stream.made.qsize() == CHUNKS_AHEAD)
        time.sleep(0.1)
        assert stream.made.qsize() == CHUNKS_AHEAD
        next(stream)
    maps = Path(f"/proc/{worker.process.pid}/maps")
    if maps.exists():
        assert "libtorch" not in maps.read_text() and "sentencepiece" in maps.read_text()
    del owner
    assert worker.process.poll() is not None  # it ended with its owner


def test_a_worker_that_is_killed_is_a_message(text_folder, tokenizer_path):
    reader = open_tiny("text", text_folder, tokenizer_path, num_workers=1).train_reader(4, 4, 0, 1)
    next(reader)
    worker = next(iter(reader._streams.values()))._chunks.signs
    worker.process.send_signal(signal.SIGKILL)
    with pytest.raises(UserError, match=r"data\.num_workers: .*signal 9"):
        for _ in range(10_000):
            next(reader)
    with pytest.raises(UserError, match="signal 9"):
        next(reader)


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_workers_end_with_a_trainer_that_is_killed(text_folder, tokenizer_path):
    script = (
        "import sys, time; from tiny_data import open_kind\n"
        "data = open_kind('text', *sys.argv[1:], seq_length=8, vocab_size=512, seed=0, num_workers=2)\n"
        "reader = data.train_reader(4, 4, 0, 1); next(reader)\n"
        "print(*{s._chunks.signs.process.pid for s in reader._streams.values()}, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(text_folder), str(tokenizer_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(workers) == 2 and all(Path(f"/proc/{pid}").exists() for pid in workers)
    trainer.kill()
    trainer.wait()
    wait_for(lambda: not any(is_running(pid) for pid in workers))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_shard_is_the_same_message_as_without_workers(tmp_path, tokenizer_path, num_workers):
    rng = np.random.default_rng(0)
    path = write_parquet(tmp_path / "a.parquet", ["".join(map(chr, rng.integers(97, 123, 200))) for _ in range(500)])
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 3] = bytes(len(content) // 3 - 4)
    path.write_bytes(content)
    owner = Owner()
    chunks = open_chunks(owner, [source_of([shard_at(path)], tokenizer_path)], {(0, 0): START}, num_workers)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"a\.parquet: .*damaged"):
        for _ in range(100):
            next(chunks[0, 0])
    assert time.monotonic() - start < 20  # damage does not pass, so nobody waits for it


def test_a_stream_that_failed_does_not_end_the_others_of_its_worker(tmp_path, tokenizer_path):
    """The two chunks that are wanted ahead: the failure answers both, and the other stream goes on."""
    good = shard_at(write_parquet(tmp_path / "good.parquet", [text for text in make_texts(0) if text]))
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    sources = [source_of([shard], tokenizer_path) for shard in (shard_at(tmp_path / "bad.parquet"), good)]
    owner = Owner()
    chunks = open_chunks(owner, sources, {(0, 0): START, (1, 0): START}, 1)
    worker = worker_of(chunks)
    wait_for(lambda: chunks[0, 0].made.qsize() == CHUNKS_AHEAD)
    for _ in range(5):
        assert next(chunks[1, 0])
    for _ in range(3):
        with pytest.raises(UserError, match=r"bad\.parquet"):
            next(chunks[0, 0])
    assert worker.process.poll() is None


# Sources that fail ------------------------------------------------------------------------------------------------


def test_a_folder_that_comes_back_is_waited_for_and_reading_goes_on_where_it_was(tmp_path, tokenizer_path, capsys):
    """As when a network folder is mounted again: the shards behind the first are out of reach for a second."""
    (tmp_path / "text").mkdir()
    for shard in range(2):
        write_parquet(tmp_path / "text" / f"{shard}.parquet", [f"shard {shard} text {i}" for i in range(100)])
    shard = shard_at(tmp_path / "text" / "1.parquet")
    reading = read_patiently(shard, "content", patience_seconds=30.0)
    first = next(reading)
    (tmp_path / "text").rename(tmp_path / "away")
    back = threading.Timer(1.2, (tmp_path / "away").rename, [tmp_path / "text"])
    back.start()
    texts = [document.text for batch in [first, *reading] for document in batch]
    again = [document.text for batch in read_patiently(shard, "content", patience_seconds=30.0) for document in batch]
    back.join()
    assert texts == again == [f"shard 1 text {i}" for i in range(100)]
    assert "1.parquet" in capsys.readouterr().err


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_source_that_stays_away_is_named_when_patience_ends(tmp_path, tokenizer_path, num_workers, capfd):
    (tmp_path / "text").mkdir()
    shard = shard_at(write_parquet(tmp_path / "text" / "a.parquet", ["x"]))
    (tmp_path / "text").rename(tmp_path / "away")
    owner = Owner()
    chunks = open_chunks(owner, [source_of([shard], tokenizer_path, 1.0)], {(0, 0): START}, num_workers)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"a\.parquet: could not be read for 1 s .*No such file") as caught:
        next(chunks[0, 0])
    assert "data.patience_seconds" in str(caught.value)
    assert 0.9 < time.monotonic() - start < 60
    assert "trying again" in capfd.readouterr().err


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_source_that_hangs_is_named_when_patience_ends(tmp_path, tokenizer_path, num_workers, monkeypatch):
    """A pipe that nobody writes to: opening it neither succeeds nor fails."""
    monkeypatch.setattr(text_chunks, "_LEAST_LIMIT_SECONDS", 1.0)
    os.mkfifo(tmp_path / "a.jsonl")
    owner = Owner()
    source = source_of([shard_at(tmp_path / "a.jsonl")], tokenizer_path, 2.0)
    chunks = open_chunks(owner, [source], {(0, 0): START}, num_workers)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"a\.jsonl: could not be read for 3 s .*does not answer"):
        next(chunks[0, 0])
    assert 2 < time.monotonic() - start < 60
    if not num_workers:
        (tmp_path / "a.jsonl").open("w").close()  # lets the thread go


def answer(status: int) -> hub_errors.HTTPError:
    error = hub_errors.HTTPError(f"{status} from the hub")
    error.response = hub_errors.Response(status)  # of the HTTP library that the hub's uses
    return error


def test_what_passes_of_a_shard_of_the_hub_is_the_network_alone():
    shard = TextShard("hf://datasets/a/b@c/d.parquet", "d.parquet", 1)
    may_pass = storage_of(shard).may_pass
    passing = [*map(answer, (408, 429, 500, 503)), TimeoutError(), ConnectionResetError(), hub_errors.HTTPError("cut")]
    final = [*map(answer, (400, 401, 403, 404, 416)), pa.ArrowInvalid("no magic"), OSError("thrift"), EOFError()]
    mistakes = [TypeError("ours"), KeyError("ours"), MemoryError()]
    assert [may_pass(shard, error) for error in passing] == [True] * len(passing)
    assert not any(may_pass(shard, error) for error in final + mistakes)


@pytest.mark.parametrize("patience_seconds, limit_seconds", [(0.0, 60.0), (30.0, 60.0), (300.0, 450.0)])
def test_little_patience_with_failures_leaves_time_to_work(patience_seconds, limit_seconds):
    assert text_chunks.limit_seconds(patience_seconds) == limit_seconds


def test_a_file_that_was_removed_is_said_at_once(tmp_path):
    shard = shard_at(write_parquet(tmp_path / "a.parquet", ["x"]))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(UserError, match="gone"):
        next(read_patiently(shard, "content"))
