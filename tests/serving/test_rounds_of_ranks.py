"""The rounds that ranks really agree on, held against the proof of rolling steps; and wake-ups that are lost, late or
doubled.
"""

import hashlib
import random
import threading

import pytest

from pipemoe.rolling.admission import Admission
from pipemoe.rolling.offer import MAX_CHUNKS
from pipemoe.rolling.verify import Round, verify_rolling
from tests.serving.prompts import KEPT_TOKENS, STEP_TOKENS, WAIT, prompt

pytestmark = pytest.mark.mpi


@pytest.fixture
def history(monkeypatch):
    """All rounds that this rank's engines agree on, in order."""
    rounds, admit = [], Admission.admit

    def recorded(admission, offers):
        found = admit(admission, offers)
        rounds.append(Round(admission._slot, tuple(offers), found))
        return found

    monkeypatch.setattr(Admission, "admit", recorded)
    return rounds


def by_slot(history, num_slots):
    """What all ranks must have seen alike: a slot's rounds, as text."""
    of_slots = [[record for record in history if record.slot == slot] for slot in range(num_slots)]
    return {f"slot {slot}": hashlib.sha256(repr(found).encode()).hexdigest() for slot, found in enumerate(of_slots)}


def check_rounds(world, engine, history, cancelled=()):
    num_slots = len(engine._loop.slots)
    world.agree(None, by_slot(history, num_slots), "comparison of rounds")
    verify_rolling(history, engine.settings, num_slots, is_complete=True, cancelled=cancelled)
    assert not engine._loop.queue.round_work


def all_cancelled(history):
    """(rank, sequence) of what was offered, and never ended, which only a cancelled one may."""
    offered = {(r, c.sequence) for record in history for r, offer in enumerate(record.offers) for c in offer.chunks}
    ended = {(r, c.sequence) for record in history for r, of in enumerate(record.admitted) for c in of if c.is_last}
    return offered - ended


def overload(world, engine, is_right, count, cancels=0.1):
    """Two threads of every rank submit as fast as the queue takes it. Returns how many requests were cancelled."""
    num_cancelled, failed = [0, 0], []

    def submit(half):
        draw = random.Random(2 * world.rank + half)
        asked = []
        try:
            for i in range(count):
                tokens = prompt(draw.choice((1, 3, STEP_TOKENS, STEP_TOKENS + 1, draw.randint(1, KEPT_TOKENS))), i)
                asked.append((tokens, engine.submit(tokens, priority=draw.choice((0, 0, 0, -5, 9)))))
                if draw.random() < cancels:
                    num_cancelled[half] += draw.choice(asked)[1].cancel()
            for tokens, future in asked:
                if not future.cancelled():
                    first = future.result(WAIT)
                    assert draw.random() > 0.1 or is_right(tokens, first)
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=submit, args=(half,)) for half in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]


@pytest.mark.parametrize(
    ("policy", "step_tokens"),
    [("rolling", STEP_TOKENS), ("rolling", None), ("lockstep", None), ("lockstep_delayed", STEP_TOKENS)],
)
def test_rounds_at_overload_are_sound_and_the_same_on_all_ranks(
    world, open_engine, is_right, history, policy, step_tokens
):
    settings = {"policy": policy, "step_tokens": step_tokens, "delay_seconds": 0.002}
    with open_engine(**settings, max_queue=6, when_full="wait") as engine:
        overload(world, engine, is_right, 12)
    check_rounds(world, engine, history, all_cancelled(history))
    waits = [c.age for record in history for offer in record.offers for c in offer.chunks]
    assert max(waits) <= engine.settings.longest_wait(world.size)


@pytest.mark.parametrize("beside_rows", [0, STEP_TOKENS, 10**6])
def test_without_cancellations_every_request_is_admitted_to_its_end(world, open_engine, is_right, history, beside_rows):
    most = KEPT_TOKENS * (MAX_CHUNKS if beside_rows == 10**6 else 1)
    with open_engine(beside_rows=beside_rows, max_kept_tokens=most, max_queue=6, when_full="wait") as engine:
        overload(world, engine, is_right, 8, cancels=0.0)
    check_rounds(world, engine, history)
    *short, last = engine.statistics()["slots"]
    admitted = sum(c.tokens for record in history for chunks in record.admitted for c in chunks)
    assert admitted == sum(slot["rows"] for slot in (*short, last))
    if beside_rows == 10**6:  # no round is so long, and there is memory for all
        assert last["rows"] == admitted


def test_who_closes_serves_what_waits_beside_long_rounds_that_come_later(world, open_engine, is_right, history):
    """A short slot that is closed, while its rank is leaving, has not left."""
    draw = random.Random(world.rank)
    lengths = [draw.choice((1, 3, STEP_TOKENS, KEPT_TOKENS)) for _ in range(60)]
    with open_engine(beside_rows=STEP_TOKENS, max_queue=60) as engine:
        asked = [(tokens, engine.submit(tokens)) for tokens in (prompt(n, i) for i, n in enumerate(lengths))]
    assert all(is_right(tokens, future.result(WAIT)) for tokens, future in asked)
    check_rounds(world, engine, history)


@pytest.mark.parametrize("fate", ["lost", "late", "doubled"])
def test_wake_ups_may_be_lost_late_or_doubled(world, open_engine, is_right, history, monkeypatch, fate):
    """Each request comes when all slots sleep. A heartbeat makes good for what is lost."""
    conductor, timers = world.conductor, []
    if world.size == 1:
        pytest.skip("one rank wakes up nobody")
    tell_rounds = conductor.tell_rounds

    def told(rounds, at_once=False):
        tell_rounds(rounds, False)  # for the heartbeats
        if fate == "late" and at_once:
            timers.append(threading.Timer(0.02, conductor.side_channel.tell_progress))
            timers[-1].start()
        for _ in range(2 * (fate == "doubled" and at_once)):
            tell_rounds(rounds, True)

    monkeypatch.setattr(conductor, "tell_rounds", told)
    with open_engine() as engine:
        for i in range(3):
            tokens = prompt(4 + 20 * i, i)
            if world.rank == i % world.size:
                assert is_right(tokens, engine.submit(tokens).result(WAIT))
    for timer in timers:
        timer.join()
    check_rounds(world, engine, history)


@pytest.mark.slow
def test_nobody_starves_in_a_minute_of_overload(world, open_engine, is_right, history):
    with open_engine(max_queue=40, when_full="wait") as engine:
        overload(world, engine, is_right, 2000)
    check_rounds(world, engine, history, all_cancelled(history))
