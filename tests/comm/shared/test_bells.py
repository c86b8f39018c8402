"""Bells: no ring is lost, and rings that a thread does not want leave it asleep."""

import time

import numpy as np
import pytest

from pipemoe.comm.shared import words
from pipemoe.comm.shared.bells import _LONGEST_WAY_NS, Bells
from tests.comm.shared.shared_ranks import PATIENCE, memories, on_ranks

NUM_SLOTS = 2


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """What is timed below: the first calls also compile, or read compiled code from the disk."""
    bell = bells_of(2)[0]
    sleeper = bell.sleeper([1])
    sleeper.look()
    bell.ring(1, [1])
    bell.ring_here(1)
    sleeper.rest(0.0)


@pytest.fixture
def bells():
    """Of three ranks."""
    return bells_of(3)


def bells_of(num_ranks, spin_seconds=0.0):
    of_ranks = memories(num_ranks, Bells.num_bytes(NUM_SLOTS))
    addresses = [memory.ctypes.data for memory in of_ranks]
    made = [Bells(rank, addresses, NUM_SLOTS, spin_seconds) for rank in range(num_ranks)]
    made[0].memories = of_ranks  # kept alive
    return made


def returns_at_once(sleeper) -> bool:
    """Or after its longest sleep here, which no ring ends."""
    begin = time.monotonic()
    sleeper.rest(0.2)
    return time.monotonic() - begin < 0.2


def test_rings_between_look_and_rest_are_not_lost(bells):
    sleeper = bells[0].sleeper([1])
    sleeper.look()
    bells[1].ring(1, [0])
    assert returns_at_once(sleeper)


def test_a_thread_sleeps_through_fewer_rings_than_it_wants(bells):
    sleeper = bells[0].sleeper([1])
    sleeper.look()
    sleeper.want(1, 2)
    bells[1].ring(1, [0, 2])
    assert not returns_at_once(sleeper)
    bells[2].ring(1, [0, 1])
    assert returns_at_once(sleeper)


def test_the_smallest_number_of_rings_counts(bells):
    sleeper = bells[0].sleeper([0, 1])
    sleeper.look()
    sleeper.want(1, 3)
    sleeper.want(1, 1)
    sleeper.want(0, 5)
    bells[1].ring(1, [0])
    assert returns_at_once(sleeper)


def test_a_ring_is_for_one_channel_and_for_those_named(bells):
    sleeper = bells[0].sleeper([1])
    sleeper.look()
    bells[1].ring(0, [0])
    bells[1].ring(1, [2])
    assert not returns_at_once(sleeper)


def test_who_wants_every_ring_hears_those_for_others_too(bells):
    sleeper = bells[0].sleeper([1])
    sleeper.look()
    sleeper.want_every(1)
    assert returns_at_once(sleeper)  # once: what came before it asked was not rung for it
    sleeper.look()
    sleeper.want_every(1)
    bells[1].ring(1, [2])
    assert returns_at_once(sleeper)
    sleeper.want_every(1, False)
    sleeper.look()
    bells[1].ring(1, [2])
    assert not returns_at_once(sleeper)


def test_a_rank_wakes_its_own_threads_whatever_they_want(bells):
    sleeper = bells[0].sleeper([1])
    sleeper.look()
    sleeper.want(1, 9)
    bells[0].ring_here(1)
    assert returns_at_once(sleeper)
    sleeper.look()
    sleeper.stay_awake()
    assert returns_at_once(sleeper)


@pytest.mark.parametrize("spin_seconds", [0.0, 1e-4])
def test_ranks_that_take_turns_never_miss_one(spin_seconds):
    """Each waits for the flags of all others; a lost ring would let it sleep for as long as the test may take."""
    num_ranks, rounds = 3, 1000
    made = bells_of(num_ranks, spin_seconds)
    flags = np.zeros((num_ranks, 16), np.int32)

    def run(rank):
        sleeper = made[rank].sleeper([0])
        for number in range(1, rounds + 1):
            words.store(flags[rank].ctypes.data, number)
            made[rank].ring(0, range(num_ranks))
            while True:
                sleeper.look()
                missing = sum(words.load(flags[other].ctypes.data) < number for other in range(num_ranks))
                if not missing:
                    break
                sleeper.want(0, missing)
                sleeper.rest(PATIENCE)

    on_ranks(num_ranks, run)
    assert (flags[:, 0] == rounds).all()


def gives_way(bell, channel, num_cores) -> bool:
    """For as long as it does at most, each time."""
    took = []
    for _ in range(5):
        begin = time.monotonic_ns()
        bell.give_way(channel, num_cores)
        took.append(time.monotonic_ns() - begin)
    return min(took) >= _LONGEST_WAY_NS


def test_a_thread_gives_way_while_those_of_lower_channels_keep_all_cores_busy(bells):
    bells[1].say_at_work(0, True)
    assert not gives_way(bells[0], 1, 2)
    bells[2].say_at_work(0, True)
    assert gives_way(bells[0], 1, 2) and not gives_way(bells[0], 1, 3)
    assert not gives_way(bells[0], 0, 2)  # nobody is before the first
    bells[1].say_at_work(0, False)
    assert not gives_way(bells[0], 1, 2)
