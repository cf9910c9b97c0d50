"""A reader whose micro-batches are read ahead gives what it gives without, and no more than a few too early."""

import gc
import threading
import time
import weakref

import numpy as np
import pytest

from megastruct.data.prefetch import MICRO_BATCHES_AHEAD, Prefetched
from megastruct.data.reader import Reader


class Numbers(Reader):
    """Row k holds the numbers from k on; the one of sample `bad` cannot be read."""

    skipped_documents = 0

    def __init__(self, bad: int = -1) -> None:
        super().__init__(8, 2, 0, 2, 0)  # two of a step's four micro-batches are this rank's
        self.bad, self.num_read, self.threads = bad, 0, set()

    def cursor(self) -> np.ndarray:
        return np.array([[self.samples_consumed()]])

    def _read(self, places: np.ndarray) -> np.ndarray:
        self.num_read += 1
        self.threads.add(threading.current_thread())
        if self.bad in places:
            raise OSError(f"sample {self.bad}")
        return places[:, None] + np.arange(4)


def test_batches_and_cursors_are_the_readers() -> None:
    plain, ahead = Numbers(), Prefetched(Numbers())
    assert ahead.cursor().tolist() == [[0]]
    for _ in range(20):
        for left in (1, 0):
            assert next(ahead).ids.tolist() == next(plain).ids.tolist()
            if left:
                with pytest.raises(RuntimeError, match="not consumed"):
                    ahead.cursor()
        assert ahead.cursor().tolist() == plain.cursor().tolist()


def wait_until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_it_reads_a_few_ahead_and_waits_for_room() -> None:
    reader = Numbers()
    ahead = Prefetched(reader)
    for taken in range(3):
        wait_until(lambda taken=taken: reader.num_read == MICRO_BATCHES_AHEAD + taken)
        time.sleep(0.05)
        assert reader.num_read == MICRO_BATCHES_AHEAD + taken
        next(ahead)
    assert threading.current_thread() not in reader.threads


def test_an_error_comes_at_its_place_and_stays() -> None:
    ahead, plain = Prefetched(Numbers(bad=9)), Numbers()
    for _ in range(2):
        assert next(ahead).ids.tolist() == next(plain).ids.tolist()
    for _ in range(2):
        with pytest.raises(OSError, match="sample 9"):
            next(ahead)
    assert ahead.cursor().tolist() == [[8]]  # what was taken before is known


def test_the_thread_ends_with_its_owner() -> None:
    reader = Numbers()
    ahead = Prefetched(reader)
    next(ahead)
    threads, alive = reader.threads, weakref.ref(reader)
    wait_until(lambda: threads)
    (thread,) = threads
    del ahead, reader
    wait_until(lambda: gc.collect() is not None and alive() is None and not thread.is_alive())
