"""Words that threads share without the GIL."""

import threading
import time

import numpy as np
import pytest

from pipemoe.comm.shared import words
from tests.comm.shared.shared_ranks import PATIENCE, on_ranks


@pytest.fixture
def word():
    memory = np.zeros(16, np.int32)
    yield memory.ctypes.data
    assert not memory[1:].any()  # nothing beside it was written


def soon() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) + PATIENCE * 10**9


def test_this_machine_has_futexes():
    assert words.has_futexes()


def test_a_word_holds_what_was_stored(word):
    for value in (5, -1, 2**31 - 1, -(2**31)):
        words.store(word, value)
        assert words.load(word) == value
    assert words.add(word, 3) == -(2**31) and words.load(word) == -(2**31) + 3


def test_adds_of_several_threads_are_all_counted(word):
    before = on_ranks(4, lambda rank: [words.add(word, 1) for _ in range(5000)])
    assert words.load(word) == 20000
    assert sorted(value for of_rank in before for value in of_rank) == list(range(20000))


def test_a_thread_sleeps_until_it_is_woken(word):
    order, asleep = [], threading.Event()

    def sleep():
        asleep.set()
        while words.load(word) == 0:
            words.sleep(word, 0, soon(), 1)
        order.append("awake")

    thread = threading.Thread(target=sleep, daemon=True)
    thread.start()
    assert asleep.wait(PATIENCE)
    order.append("ring")
    words.store(word, 1)
    words.wake(word, 1)
    thread.join(PATIENCE)
    assert order == ["ring", "awake"]


def test_a_word_that_has_changed_lets_nobody_sleep(word):
    words.store(word, 1)
    begin = time.monotonic()
    words.sleep(word, 0, soon(), 1)
    assert time.monotonic() - begin < PATIENCE


def test_a_sleep_ends_by_itself(word):
    words.sleep(word, 0, time.clock_gettime_ns(time.CLOCK_MONOTONIC) + 1000, 1)
    words.sleep(word, 0, 0, 1)  # a time that has passed
