"""Pieces of many token files with few of them open, and a file that is cut under a running job."""

import os
import resource

import numpy as np
import pytest

from megastruct.data.tokens.files import Descriptors, TokenFiles
from megastruct.errors import UserError
from test_readers import open_tiny


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(6):
        rng.integers(0, 60_000, 1000).astype("<u2").tofile(tmp_path / f"{index}.bin")
    return [tmp_path / f"{index}.bin" for index in range(6)]


def test_pieces_are_right_and_few_files_are_open(paths):
    descriptors = Descriptors(most_open=2)
    both = [TokenFiles(paths, np.dtype("<u2"), descriptors) for _ in range(2)]  # two sources: one limit for both
    wholes = [np.fromfile(path, "<u2") for path in paths]
    rng = np.random.default_rng(1)
    for attempt in range(200):
        files = both[attempt % 2]
        file, offset, count = rng.integers(0, 6), rng.integers(0, 900), rng.integers(1, 100)
        files.will_read(int(file), int(offset), int(count))
        piece = files.read(int(file), int(offset), int(count))
        np.testing.assert_array_equal(piece, wholes[file][offset : offset + count])
        assert len(descriptors.open) <= 2
    del both, files
    assert not descriptors.open


def test_when_there_are_no_descriptors_left_the_oldest_is_closed(paths):
    """Whatever else holds files open: here all that the process may have."""
    files = TokenFiles(paths, np.dtype("<u2"), Descriptors(most_open=6))
    wholes = [np.fromfile(path, "<u2") for path in paths]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files.read(0, 0, 10)
    files.read(1, 0, 10)
    highest = os.open(os.devnull, os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    taken = [highest]
    try:
        try:
            while True:  # below the limit there may be gaps
                taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        for file in [*range(6), *range(6)]:
            np.testing.assert_array_equal(files.read(file, 0, 1000), wholes[file])
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_that_is_cut_or_removed_is_named(paths):
    files = TokenFiles(paths, np.dtype("<u2"), Descriptors(most_open=1))
    files.read(0, 0, 1000)
    with paths[0].open("r+b") as file:
        file.truncate(999)
    with pytest.raises(UserError, match=r"0\.bin: ends at byte 999"):
        files.read(0, 0, 1000)
    files.read(0, 0, 499)
    paths[1].unlink()
    files.will_read(1, 0, 10)  # says nothing: whoever reads it will
    with pytest.raises(UserError, match=r"1\.bin: cannot be read \(No such file"):
        files.read(1, 0, 10)


def test_the_system_is_asked_for_every_row_before_it_is_read(token_folder, tokenizer_path, monkeypatch):
    asked, order = set(), []
    will_read, read = TokenFiles.will_read, TokenFiles.read
    monkeypatch.setattr(TokenFiles, "will_read", lambda self, *a: asked.add(a[:2]) or will_read(self, *a))
    monkeypatch.setattr(
        TokenFiles, "read", lambda self, *a: order.append(a[:2] in asked or a[1] == 0) or read(self, *a)
    )
    reader = open_tiny("tokens", token_folder, tokenizer_path).train_reader(4, 2, 1, 2)
    for _ in range(50):
        next(reader)
    assert len(order) >= 100 and all(order)  # what begins a file is the rest of a row of the file before
