"""A rank's queue of one slot."""

import pytest

from pipemoe.errors import PlanError
from pipemoe.rolling.admission import RollingSettings
from pipemoe.rolling.offer import MAX_CHUNKS, Chunk
from pipemoe.rolling.waiting import Waiting

SETTINGS = RollingSettings(max_tokens_per_round=100, max_round_rows=150, chunk_tokens=50, most_rounds_waited=3)


def waiting(slot: int = 1, **lengths: int) -> Waiting:
    queue = Waiting(slot, 2, SETTINGS)
    for sequence, length in lengths.items():
        queue.add(int(sequence[1:]), length)
    return queue


def test_a_long_sequence_goes_chunk_by_chunk():
    queue = waiting(s0=120)
    for start, stop in ((0, 50), (50, 100), (100, 120)):
        assert (len(queue), queue.waiting_tokens) == (1, 120 - start)
        (chunk,) = queue.offer()
        assert chunk == Chunk(0, start, stop, 120)
        settled = queue.settle((chunk,))
        assert settled == ((chunk,), (0,) if stop == 120 else (), ())
    assert (len(queue), queue.waiting_tokens, queue.offer()) == (0, 0, ())


def test_a_chunk_may_be_admitted_in_part():
    queue = waiting(s0=60)
    (chunk,) = queue.offer()
    queue.settle((chunk._replace(stop=20),))
    assert queue.offer() == (Chunk(0, 20, 60, 60),)
    assert queue.waiting_tokens == 40


def test_what_is_not_admitted_grows_older():
    queue = waiting(slot=0, s0=60, s1=70)
    _, second = queue.offer()
    queue.settle((second,))
    queue.add(2, 10)
    assert queue.offer() == (Chunk(0, 0, 60, 60, 1), Chunk(2, 0, 10, 10, 0))


def test_at_most_two_rounds_of_tokens_are_on_offer():
    assert len(waiting(slot=0, **{f"s{n}": 50 for n in range(9)}).offer()) == 4
    assert len(waiting(slot=0, **{f"s{n}": 1 for n in range(99)}).offer()) == MAX_CHUNKS


def test_higher_priorities_are_offered_first_but_nobody_is_passed_over_for_ever():
    queue = Waiting(0, 2, SETTINGS)
    queue.add(0, 100, priority=-1)
    for sequence in range(1, 9):
        queue.add(sequence, 100, priority=5)
    offered = []
    for _ in range(4):
        chunks = queue.offer()
        offered.append([c.sequence for c in chunks])
        queue.settle(chunks[:1])
    assert offered == [[1, 2], [2, 3], [3, 4], [4, 0]]


def test_rolling_offers_the_shortest_first_and_lockstep_what_came_first():
    for policy, first in (("rolling", [1, 2]), ("lockstep", [0, 1])):
        queue = Waiting(0, 2, SETTINGS._replace(policy=policy))
        for sequence, length in enumerate((100, 98, 99)):
            queue.add(sequence, length)
        queue.add(3, 100)
        assert [c.sequence for c in queue.offer()][:2] == first


def test_memory_is_reserved_once_in_order_and_who_gets_none_holds_up_those_behind():
    queue, asked = waiting(slot=0, s0=10, s1=10, s2=10), []

    def reserve(sequence: int) -> bool:
        asked.append(sequence)
        return len(asked) != 2

    assert [c.sequence for c in queue.offer(reserve)] == [0]
    queue.settle(())
    assert [c.sequence for c in queue.offer(reserve)] == [0, 1, 2]
    assert asked == [0, 1, 1, 2]


def test_what_is_queued_is_cancelled_at_once():
    queue = waiting(s0=30, s1=20)
    assert queue.cancel(0) and not queue.cancel(0) and not queue.cancel(9)
    assert queue.waiting_tokens == 20
    assert [c.sequence for c in queue.offer()] == [1]


def test_what_is_on_offer_travels_if_it_is_admitted():
    queue = waiting(s0=120)
    (chunk,) = queue.offer()
    assert not queue.cancel(0)
    assert queue.settle((chunk,)) == ((chunk,), (0,), ())
    assert (len(queue), queue.waiting_tokens, queue.offer()) == (0, 0, ())


def test_what_is_on_offer_is_withdrawn_if_it_is_not_admitted():
    queue = waiting(s0=120)
    queue.offer()
    assert not queue.cancel(0) and not queue.cancel(0)
    assert queue.settle(()) == ((), (), (0,))
    assert (len(queue), queue.waiting_tokens) == (0, 0)


def test_what_has_begun_is_cancelled_between_rounds():
    queue = waiting(s0=120)
    queue.settle(queue.offer())
    assert queue.cancel(0)
    assert (len(queue), queue.waiting_tokens) == (0, 0)


def test_a_round_is_settled_before_the_next_offer():
    queue = waiting(s0=1)
    queue.offer()
    with pytest.raises(PlanError, match="the one before is not settled"):
        queue.offer()
