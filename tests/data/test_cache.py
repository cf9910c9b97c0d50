"""What is found by reading much is read once: by the ranks that start together, and at the next start."""

import multiprocessing
import shutil

import numpy as np
import pytest

from megastruct.data.cache import cached_array, key_of
from megastruct.data.text import held_out
from megastruct.data.text import open as open_module
from megastruct.errors import UserError
from test_readers import open_tiny
from tiny_data import open_kind


def count_and_find(folder, counter, barrier):
    def find():
        with counter.get_lock():
            counter.value += 1
        return np.arange(1000)

    barrier.wait()
    assert cached_array(folder, "x", find).tolist() == list(range(1000))


def test_of_those_that_ask_together_one_looks(tmp_path):
    context = multiprocessing.get_context("fork")
    counter, barrier = context.Value("i", 0), context.Barrier(4)
    processes = [context.Process(target=count_and_find, args=(tmp_path / "cache", counter, barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4 and counter.value == 1


def test_without_a_folder_or_with_a_damaged_file_it_is_found_anew(tmp_path):
    calls = []

    def find():
        calls.append(1)
        return np.array([1, 2])

    assert cached_array(None, "x", find).tolist() == [1, 2]
    assert cached_array(tmp_path / "no" / "folder", "x", find).tolist() == [1, 2]
    assert not (tmp_path / "no").exists() and len(calls) == 2
    cached_array(tmp_path / "cache", "x", find)
    cached_array(tmp_path / "cache", "x", find)
    assert len(calls) == 3
    (tmp_path / "cache" / "x.npy").write_bytes(b"\x93NUMPY cut")
    assert cached_array(tmp_path / "cache", "x", find).tolist() == [1, 2] and len(calls) == 4
    assert cached_array(tmp_path / "cache", "y", find).tolist() == [1, 2] and len(calls) == 5
    assert key_of("a", 1) != key_of("a", 2)


def test_held_out_text_is_read_at_the_first_start_only(tmp_path, text_folder, tokenizer_path, monkeypatch):
    read, checked = [], []
    read_patiently, check_shards = held_out.read_patiently, open_module.check_shards
    monkeypatch.setattr(held_out, "read_patiently", lambda *a, **k: read.append(a) or read_patiently(*a, **k))
    monkeypatch.setattr(open_module, "check_shards", lambda *a: checked.append(a) or check_shards(*a))
    batches = []
    for _ in range(2):
        data = open_tiny("text", text_folder, tokenizer_path, cache_folder=tmp_path / "cache")
        batches += [batch.ids for batch in (*data.validation_batches(6, 6, 0, 1), *data.validation_batches(6, 6, 0, 1))]
        first = len(read), len(checked)
        assert first[0] > 0 and first[1] == 1
    assert (len(read), len(checked)) == first  # neither the second call nor the second start read anything
    assert all((ids == batches[0]).all() for ids in batches)
    uncached = open_tiny("text", text_folder, tokenizer_path).validation_batches(6, 6, 0, 1)[0].ids
    assert (uncached == batches[0]).all() and len(checked) == 2
    open_tiny("text", text_folder, tokenizer_path, cache_folder=tmp_path / "cache").validation_batches(12, 6, 0, 1)
    assert len(read) > first[0]  # more is wanted than was kept


def test_a_shard_that_changed_is_checked_again(tmp_path, text_folder, tokenizer_path):
    text = shutil.copytree(text_folder, tmp_path / "text")
    options = {"seq_length": 8, "vocab_size": 512, "seed": 0, "cache_folder": tmp_path / "cache"}
    open_kind("text", str(text), tokenizer_path, **options)
    path = text / "shard-2.parquet"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"shard-2\.parquet"):
        open_kind("text", str(text), tokenizer_path, **options)
