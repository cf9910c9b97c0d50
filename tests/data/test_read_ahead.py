"""One thread that makes the items of several iterators ahead: each bounded, in order, and on its own when it fails."""

import gc
import threading
import time
import weakref

import pytest

from megastruct.data.read_ahead import Maker, ReadAhead


class Owner:
    """Something for a thread to live as long as."""


class Counter:
    """0, 1, 2, ... up to `end`, or to `bad`, which fails."""

    def __init__(self, end: int = 1000, bad: int = -1) -> None:
        self.made, self.end, self.bad = 0, end, bad

    def __iter__(self):
        return self

    def __next__(self) -> int:
        if self.made == self.end:
            raise StopIteration
        if self.made == self.bad:
            raise OSError(f"item {self.bad}")
        self.made += 1
        return self.made - 1


def wait_until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("num_ahead", [1, 3])
def test_nothing_is_made_before_it_begins_and_then_so_many_and_no_more(num_ahead) -> None:
    owner, items = Owner(), Counter()
    ahead = ReadAhead(Maker(owner, "test").supply(items), num_ahead)
    time.sleep(0.05)
    assert items.made == 0
    for taken in range(5):
        assert next(ahead) == taken
        wait_until(lambda taken=taken: items.made == taken + 1 + num_ahead)
        time.sleep(0.02)
        assert items.made == taken + 1 + num_ahead


def test_an_iterator_that_fails_or_ends_does_not_end_the_others() -> None:
    owner = Owner()
    maker = Maker(owner, "test")
    bad, short, good = (ReadAhead(maker.supply(items), 2) for items in (Counter(bad=3), Counter(end=4), Counter()))
    taken = []
    for _ in range(3):
        taken += [next(bad), next(short), next(good)]
    assert taken == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for _ in range(3):
        with pytest.raises(OSError, match="item 3"):
            next(bad)
    assert list(short) == [3] and list(short) == []
    assert [next(good) for _ in range(10)] == list(range(3, 13))


def test_the_thread_ends_with_its_owner_and_keeps_nothing() -> None:
    owner, items = Owner(), Counter()
    ahead = ReadAhead(Maker(owner, "ends with its owner").supply(items), 2)
    next(ahead)
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "ends with its owner")
    alive = weakref.ref(items)
    del items, ahead
    wait_until(lambda: gc.collect() is not None and alive() is None)  # also while the thread lives
    assert thread.is_alive()
    del owner
    wait_until(lambda: gc.collect() is not None and not thread.is_alive())
