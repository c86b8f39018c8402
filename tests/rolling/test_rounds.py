"""When a slot posts, sleeps, wakes up and ends."""

import pytest

from pipemoe.errors import PlanError
from pipemoe.rolling.admission import RollingSettings
from pipemoe.rolling.offer import Chunk, Offer
from pipemoe.rolling.rounds import SlotRounds, When, pause_seconds

CHUNK = Chunk(0, 0, 5, 5)
EMPTY, WORK, LEAVING = Offer(), Offer((CHUNK,)), Offer(leaving=True)


def after(*rounds: tuple[Offer, Offer, bool]) -> SlotRounds:
    """Two ranks' slot, as the first sees it, after these rounds: both offers, and whether the first's chunks go."""
    slot = SlotRounds()
    for mine, other, goes in rounds:
        slot.post(mine)
        if slot.agree([mine, other], [mine.chunks if goes else (), other.chunks if goes else ()]):
            slot.finish()
    return slot


def test_a_slot_sleeps_until_there_is_work():
    slot = SlotRounds()
    assert slot.is_asleep and slot.when(False, False) is When.NOT_YET
    assert slot.when(True, False) is When.NOW
    assert slot.post(WORK) == 1
    assert not slot.is_asleep and slot.is_exchanging and slot.when(True, False) is When.NOT_YET


def test_after_a_round_with_work_everybody_posts():
    slot = after((EMPTY, WORK, True))
    assert not slot.is_asleep and slot.when(False, False) is When.NOW


def test_after_a_round_without_work_nobody_posts():
    slot = after((WORK, EMPTY, True), (EMPTY, EMPTY, False))
    assert slot.is_asleep and slot.when(False, False) is When.NOT_YET and slot.when(True, False) is When.NOW


@pytest.mark.parametrize("levels", [(3,), (3, 3), (1, 3, 2), (3, 1, 1)])
def test_a_level_wakes_up_however_often_it_comes(levels):
    slot = after((WORK, EMPTY, True), (EMPTY, EMPTY, False))
    for level in levels:
        slot.hear(level)
    assert slot.when(False, False) is When.NOW
    slot.post(EMPTY)
    slot.agree([EMPTY, EMPTY], [(), ()])
    for level in levels:  # again, late
        slot.hear(level)
    assert slot.is_asleep and slot.when(False, False) is When.NOT_YET


def test_a_level_that_comes_before_its_time_is_kept():
    slot = SlotRounds()
    slot.post(WORK)
    slot.hear(2)  # the peer has already agreed on round 1
    assert slot.when(False, False) is When.NOT_YET
    slot.agree([EMPTY, EMPTY], [(), ()])
    assert slot.when(False, False) is When.NOW


def test_the_next_offer_is_due_while_a_round_runs_but_not_the_one_after_it():
    slot = SlotRounds()
    slot.post(WORK)
    assert slot.agree([WORK, EMPTY], [(CHUNK,), ()])
    assert slot.is_running and slot.when(False, False) is When.LATE
    slot.post(WORK)
    assert slot.agree([WORK, EMPTY], [(CHUNK,), ()])
    assert slot.when(True, False) is When.NOT_YET
    slot.finish()
    assert slot.when(True, False) is When.LATE
    slot.finish()
    assert slot.when(True, False) is When.NOW


def test_a_round_that_takes_nothing_is_followed_by_a_pause_unless_a_peer_has_posted():
    slot = after((WORK, EMPTY, False))
    assert not slot.is_asleep and slot.when(True, False) is When.AFTER_PAUSE
    slot.hear(2)
    assert slot.when(True, False) is When.NOW


def test_patience_ends_before_ages_do_however_long_it_is():
    assert pause_seconds(0.0, 0.0) == 1e-3
    assert 5.0 / pause_seconds(0.0, 5.0) < RollingSettings(1, 1, 1).most_rounds_waited
    assert 2.0 / pause_seconds(2.0, 0.0) < RollingSettings(1, 1, 1).most_rounds_waited


def test_leaving_is_said_once_and_ends_when_all_say_it():
    slot = SlotRounds()
    assert slot.when(False, True) is When.NOW
    slot.post(LEAVING)
    assert not slot.agree([LEAVING, EMPTY], [(), ()])
    assert not slot.has_ended and slot.is_asleep and slot.when(False, True) is When.NOT_YET
    slot.hear(2)
    assert slot.when(False, True) is When.NOW
    slot.post(LEAVING)
    slot.agree([LEAVING, LEAVING], [(), ()])
    assert slot.has_ended and slot.is_asleep
    slot.hear(9)
    assert slot.when(True, True) is When.NOT_YET
    with pytest.raises(PlanError, match="the last"):
        slot.post(EMPTY)


def test_a_rank_that_leaves_serves_the_others():
    slot = after((LEAVING, WORK, True))
    assert not slot.has_ended and slot.when(False, True) is When.NOW


def test_a_round_cannot_be_posted_twice():
    slot = SlotRounds()
    slot.post(EMPTY)
    with pytest.raises(PlanError, match="round 1 is not agreed yet"):
        slot.post(EMPTY)
