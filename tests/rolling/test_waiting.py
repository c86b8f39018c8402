"""A rank's queue, and what its slots have on offer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.errors import PlanError
from pipemoe.rolling.admission import RollingSettings
from pipemoe.rolling.offer import MAX_CHUNKS, Chunk
from pipemoe.rolling.waiting import Queue, Waiting

SETTINGS = RollingSettings(max_tokens_per_round=100, max_round_rows=150, chunk_tokens=50, most_rounds_waited=3)
BESIDE_LONG = SETTINGS._replace(fixed_rows=10, beside_rows=40)


class Slot(Waiting):
    """One with a queue of its own."""

    def __init__(self, slot: int = 1, num_slots: int = 2, settings: RollingSettings = SETTINGS) -> None:
        self.queue = Queue(settings)
        super().__init__(slot, num_slots, settings, self.queue)


def two_slots(settings: RollingSettings = SETTINGS) -> tuple[Queue, Waiting, Waiting]:
    """The queue of a short and a long slot, and these."""
    queue = Queue(settings)
    return queue, *(Waiting(slot, 2, settings, queue) for slot in range(2))


def waiting(slot: int = 1, **lengths: int) -> Slot:
    found = Slot(slot)
    for sequence, length in lengths.items():
        found.queue.add(int(sequence[1:]), length)
    return found


def test_a_long_sequence_goes_chunk_by_chunk():
    queue = waiting(s0=120)
    for start, stop in ((0, 50), (50, 100), (100, 120)):
        assert (queue.has_work, queue.waiting_tokens) == (True, 120 - start)
        (chunk,) = queue.offer()
        assert chunk == Chunk(0, start, stop, 120)
        settled = queue.settle((chunk,))
        assert settled == ((chunk,), (0,) if stop == 120 else (), ())
    assert (queue.has_work, queue.waiting_tokens, queue.offer()) == (False, 0, ())


def test_a_chunk_may_be_admitted_in_part():
    queue = waiting(s0=60)
    (chunk,) = queue.offer()
    queue.settle((chunk._replace(stop=20),))
    assert queue.offer() == (Chunk(0, 20, 60, 60),)
    assert queue.waiting_tokens == 40


def test_what_is_not_admitted_grows_older():
    queue = waiting(s0=50, s1=50)
    _, second = queue.offer()
    queue.settle((second,))
    queue.queue.add(2, 10)
    assert queue.offer() == (Chunk(0, 0, 50, 50, 1), Chunk(2, 0, 10, 10, 0))


def test_a_lone_slot_offers_two_rounds_of_tokens_and_one_beside_others_a_round():
    for num_slots, count in ((1, 4), (2, 2)):
        slot = Slot(num_slots - 1, num_slots)
        for sequence in range(9):
            slot.queue.add(sequence, 50)
        assert len(slot.offer()) == count
    slot = Slot(0, 1)
    for sequence in range(99):
        slot.queue.add(sequence, 1)
    assert len(slot.offer()) == MAX_CHUNKS


def test_beside_other_slots_a_half_of_what_waits_is_on_offer():
    """With a cost model; the other half is for the next slot that can take it."""
    queue, *slots = two_slots(SETTINGS._replace(fixed_rows=10))
    for sequence in range(8):
        queue.add(sequence, 10)
    assert [len(slot.offer()) for slot in slots] == [4, 2]
    assert [slot.waiting_tokens for slot in slots] == [60, 40] and len(queue) == 2
    assert [slot.num_offered for slot in slots] == [4, 2]


def test_a_slot_takes_from_the_queue_what_no_other_has():
    queue, short, long = two_slots()
    queue.add(0, 40)
    assert short.has_work and long.has_work
    assert [c.sequence for c in short.offer()] == [0] and not long.has_work and long.offer() == ()
    queue.add(1, 40)  # while a round of the first slot is under way
    long.settle(())
    assert [c.sequence for c in long.offer()] == [1]


def test_a_short_slot_takes_nothing_new_but_beside_a_long_round():
    queue, short, long = two_slots(BESIDE_LONG)
    queue.add(0, 10)
    for tokens, is_open in ((39, False), (40, True)):
        long.begin([(), (Chunk(7, 0, 20, 50), Chunk(8, 0, tokens - 20, 50)), (Chunk(9, 0, 30, 50),)])
        assert (short.has_work, short.may_have_work) == (is_open, True)
    assert [chunk.sequence for chunk in short.offer()] == [0]
    queue.add(1, 10)
    long.end()
    short.settle(())
    short.begin([(Chunk(5, 0, 90, 90),)])  # its own round opens nothing
    assert [chunk.sequence for chunk in short.offer()] == [0]  # what it has on offer stays there
    assert [chunk.sequence for chunk in long.offer()] == [1]


def test_a_short_slot_serves_while_a_longer_one_has_no_memory():
    queue, short, long = two_slots(BESIDE_LONG)
    queue.add(0, 10)
    assert not short.has_work and long.offer(lambda sequence: False) == () and short.has_work
    long.settle(())
    queue.add(1, 1000)
    assert len(long.offer()) == 2 and not queue.full
    queue.add(2, 10)
    assert not short.has_work


def test_a_short_slot_leaves_only_when_nothing_is_left_for_it():
    queue, short, long = two_slots(BESIDE_LONG)
    queue.add(0, 10)
    queue.add(1, 1000)
    assert not short.has_work and short.may_have_work
    assert {chunk.sequence for chunk in long.offer()} == {0, 1}
    assert not short.may_have_work


@pytest.mark.parametrize("num_slots", [1, 2])
def test_what_has_begun_holds_up_nothing_that_goes_first_and_that_no_other_slot_takes(num_slots):
    slot = Slot(num_slots - 1, num_slots)
    for sequence in range(4):
        slot.queue.add(sequence, 1000)
    begun = slot.offer()
    slot.settle(begun[:1])  # 950 tokens are left of it
    cases = [(949, 0, True), (950, 0, False), (10**6, 1, True), (949, -1, False), (50, 2, num_slots == 1)]
    for sequence, (length, priority, goes) in enumerate(cases, 4):
        slot.queue.add(sequence, length, priority)
        assert [c.sequence for c in slot.offer()[len(begun) :]] == [sequence] * goes
        slot.settle(())
        assert (slot if goes else slot.queue).cancel(sequence)


def test_in_lockstep_what_is_shorter_does_not_go_first():
    slot = Slot(0, 1, SETTINGS._replace(policy="lockstep"))
    for sequence in range(4):
        slot.queue.add(sequence, 1000)
    count = len(slot.offer())
    slot.settle(())
    slot.queue.add(4, 10)
    assert len(slot.offer()) == count


def short(length: int, *more: int, **changed) -> bool:
    """May a short slot take this, if more waits?"""
    slot = Slot(0, 2, SETTINGS._replace(max_tokens_per_round=4096, **changed))
    for sequence, tokens in enumerate((length, *more)):
        slot.queue.add(sequence, tokens)
    return 0 in [c.sequence for c in slot.offer()]


def test_without_a_cost_model_a_chunk_is_short():
    assert [short(length) for length in (1, 50, 51)] == [True, True, False]


def test_what_costs_no_more_than_a_round_by_itself_is_short():
    assert [short(length, fixed_rows=2000) for length in (1, 2000, 2001)] == [True, True, False]
    assert [short(length, fixed_rows=2000, pairs_per_row=1000) for length in (1200, 1300)] == [True, False]


def test_the_more_waits_the_more_is_short():
    assert [short(3000, waiting, fixed_rows=2000) for waiting in (2999, 3000)] == [False, True]
    assert not short(4097, *[10**6] * 3, fixed_rows=2000)  # no round holds it


def test_the_last_slot_takes_everything():
    assert waiting(1, s0=1).has_work and waiting(1, s0=10**6).has_work
    assert Slot(0, 1).has_work is False


def test_higher_priorities_are_offered_first_but_nobody_is_passed_over_for_ever():
    slot = Slot(0, 1)
    slot.queue.add(0, 50, priority=-1)
    for sequence in range(1, 9):
        slot.queue.add(sequence, 50, priority=5)
    offered = []
    for _ in range(4):
        chunks = slot.offer()
        offered.append([c.sequence for c in chunks])
        slot.settle(chunks[:1])
    assert offered == [[1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6], [4, 5, 6, 0]]


def test_a_short_slot_passes_over_what_is_long_even_if_it_is_old():
    slot = waiting(0, s0=60, s1=40)
    for _ in range(4):
        slot.offer()
        slot.settle(())
    slot.queue.add(2, 45)
    assert [c.sequence for c in slot.offer()] == [1, 2] and len(slot.queue) == 1


def test_rolling_offers_the_shortest_first_and_lockstep_what_came_first():
    for policy, first in (("rolling", [1, 2]), ("lockstep", [0, 1])):
        slot = Slot(0, 1, SETTINGS._replace(policy=policy))
        for sequence, length in enumerate((50, 48, 49)):
            slot.queue.add(sequence, length)
        slot.queue.add(3, 50)
        assert [c.sequence for c in slot.offer()][:2] == first


def naive_next(model: dict, round_: int, most: int, policy: str) -> int | None:
    """model: of each sequence the length, priority and round before which it came."""
    fitting = {s: found for s, found in model.items() if found[0] <= most}
    old = [s for s, (_, _, came) in fitting.items() if round_ - came >= SETTINGS.most_rounds_waited]
    if old:
        return min(old)
    by_length = policy == "rolling"
    return min(fitting, key=lambda s: (-fitting[s][1], fitting[s][0] if by_length else 0, s), default=None)


@settings(max_examples=200, deadline=None)
@given(
    policy=st.sampled_from(["rolling", "lockstep"]),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 5), st.integers(-1, 1)),
            st.tuples(st.sampled_from(["take", "cancel", "has_any"]), st.integers(0, 6), st.none()),
            st.tuples(st.just("round"), st.none(), st.none()),
        ),
        max_size=40,
    ),
)
def test_a_queue_is_what_a_plain_search_finds(policy, steps):
    queue, model, round_ = Queue(SETTINGS._replace(policy=policy)), {}, 0
    for number, (what, size, priority) in enumerate(steps):
        if what == "add":
            queue.add(number, size, priority)
            model[number] = size, priority, round_
        elif what == "take":
            found = queue.next_of(size)
            assert found == naive_next(model, round_, size, policy)
            if found is not None:
                assert queue.take(found).length == model.pop(found)[0]
        elif what == "cancel":
            chosen = sorted(model)[size] if size < len(model) else -1
            assert queue.cancel(chosen) == (model.pop(chosen, None) is not None)
        elif what == "round":
            queue.count_round()
            round_ += 1
        assert queue.has_any(size or 3) == any(length <= (size or 3) for length, _, _ in model.values())
        assert (len(queue), queue.tokens) == (len(model), sum(length for length, _, _ in model.values()))


def test_memory_is_reserved_once_in_order_and_who_gets_none_holds_up_those_behind():
    queue, asked = waiting(s0=10, s1=10, s2=10), []

    def reserve(sequence: int) -> bool:
        asked.append(sequence)
        return len(asked) != 2

    assert [c.sequence for c in queue.offer(reserve)] == [0]
    queue.settle(())
    assert [c.sequence for c in queue.offer(reserve)] == [0, 1, 2]
    assert asked == [0, 1, 1, 2]


def test_what_is_queued_is_cancelled_at_once():
    queue = waiting(s0=30, s1=20)
    assert queue.queue.cancel(0) and not queue.queue.cancel(0) and not queue.queue.cancel(9)
    assert queue.waiting_tokens == 20 and not queue.cancel(1)
    assert [c.sequence for c in queue.offer()] == [1]


def test_what_is_on_offer_travels_if_it_is_admitted():
    queue = waiting(s0=120)
    (chunk,) = queue.offer()
    assert not queue.cancel(0)
    assert queue.settle((chunk,)) == ((chunk,), (0,), ())
    assert (queue.has_work, queue.waiting_tokens, queue.offer()) == (False, 0, ())


def test_what_is_on_offer_is_withdrawn_if_it_is_not_admitted():
    queue = waiting(s0=120)
    queue.offer()
    assert not queue.cancel(0) and not queue.cancel(0)
    assert queue.settle(()) == ((), (), (0,))
    assert (queue.has_work, queue.waiting_tokens) == (False, 0)


def test_what_has_begun_is_cancelled_between_rounds():
    queue = waiting(s0=120)
    queue.settle(queue.offer())
    assert queue.cancel(0)
    assert (queue.has_work, queue.waiting_tokens) == (False, 0)


def test_a_round_is_settled_before_the_next_offer():
    queue = waiting(s0=1)
    queue.offer()
    with pytest.raises(PlanError, match="the one before is not settled"):
        queue.offer()
