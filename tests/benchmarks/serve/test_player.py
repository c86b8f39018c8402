"""The player against an engine whose times are known: on one rank in virtual time, on several in threads."""

from __future__ import annotations

import math
import threading
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.serve.board import Board
from benchmarks.serve.player import RankPlayer
from pipemoe.traffic.arrival_times import Arrival
from pipemoe.traffic.campaign import Limits
from pipemoe.traffic.policy import Policy
from pipemoe.traffic.served import LengthClasses

ROLLING, BALANCED = Policy("rolling"), Policy("lockstep_balanced", 64, "least_tokens")
IDS = np.arange(100, dtype=np.int64)
MS = 1e-3


class Clock:
    """Time that passes only when somebody sleeps. Whoever is to be told of a time is told before it has passed."""

    def __init__(self):
        self.time, self.calls = 0.0, []

    def now(self):
        return self.time

    def sleep(self, seconds):
        self.time += seconds
        due = sorted((call for call in self.calls if call[0] <= self.time), key=lambda call: call[0])
        self.calls = [call for call in self.calls if call[0] > self.time]
        for _, tell in due:
            tell()


class QueueEngine:
    """One queue, a millisecond per token. Prompts of `bad` tokens fail."""

    def __init__(self, clock, bad=None):
        self.clock, self.bad, self.free, self.prompts = clock, bad, 0.0, []

    def submit(self, tokens):
        self.prompts.append(np.array(tokens))
        future, admitted = Future(), max(self.free, self.clock.now())
        self.free = admitted + len(tokens) * MS
        found = SimpleNamespace(admitted=admitted, first_token=self.free)

        def tell():
            if future.set_running_or_notify_cancel():
                if len(tokens) == self.bad:
                    future.set_exception(RuntimeError("bad"))
                else:
                    future.set_result(found)

        self.clock.calls.append((self.free, tell))
        return future

    def statistics(self):
        return {"rounds": len(self.prompts)}


@pytest.fixture
def lone(tmp_path, monkeypatch):
    """A player of one rank, its clock, and the engines that it has opened."""
    clock, engines = Clock(), []

    @contextmanager
    def open_engine(policy, num_requests):
        engines.append(QueueEngine(clock, bad=13))
        yield engines[-1]

    def wait(futures, timeout=None):  # in virtual time
        left = set()
        for _ in range(10_000):
            left = {f for f in futures if not f.done()}
            if not left or timeout:
                break
            clock.sleep(MS)
        if timeout and left:
            clock.sleep(timeout)
        return SimpleNamespace(not_done=left)

    monkeypatch.setattr("benchmarks.serve.player.wait", wait)
    board = Board(tmp_path / "board", 0, 1, 64, create=True)
    return SimpleNamespace(
        play=RankPlayer(board, open_engine, IDS, clock=clock.now, sleep=clock.sleep), clock=clock, engines=engines
    )


def arrivals(*pairs):
    return [Arrival(n, seconds, tokens) for n, (seconds, tokens) in enumerate(pairs)]


@pytest.mark.parametrize("policy", [ROLLING, BALANCED])
def test_times_count_from_when_a_request_is_due(lone, policy):
    served = lone.play.play(policy, arrivals((0, 10), (0.002, 20), (1.0, 5)))
    assert [s.ttft for s in served] == pytest.approx([10 * MS, 28 * MS, 5 * MS])
    assert [s.queueing for s in served] == pytest.approx([0, 8 * MS, 0])
    assert [(s.number, s.rank, s.num_tokens, s.arrival) for s in served] == [
        (0, 0, 10, 0),
        (1, 0, 20, 0.002),
        (2, 0, 5, 1.0),
    ]
    assert [list(p) for p in lone.engines[-1].prompts] == [list(range(n, n + t)) for n, t in enumerate((10, 20, 5))]
    assert lone.play.statistics[policy] == {"rounds": 3}


def test_a_policy_is_warmed_up_once(lone):
    for _ in range(2):
        lone.play.play(ROLLING, arrivals((0, 10)))
    assert len(lone.engines) == 3 and len(lone.engines[0].prompts) == 2


def test_a_request_that_fails_was_not_served(lone):
    served = lone.play.play(ROLLING, arrivals((0, 13), (0, 4)))
    assert [s.ttft for s in served] == [None, pytest.approx(17 * MS)]


def test_alone_each_request_finds_an_idle_system(lone):
    served = lone.play.alone(ROLLING, [30, 10, 13, 20])
    assert [s.ttft for s in served] == [pytest.approx(30 * MS), pytest.approx(10 * MS), None, pytest.approx(20 * MS)]
    assert all(s.queueing == pytest.approx(0) for s in served if s.ttft)


def test_a_hopeless_play_ends_early_and_only_then(lone):
    every_ms = arrivals(*((n * MS, 10) for n in range(60)))
    classes = LengthClasses(50, 60)
    reachable = Limits(classes, {"short": 1.0, "medium": math.inf, "long": math.inf})
    assert all(s.ttft is not None for s in lone.play.play(ROLLING, every_ms, reachable))
    begin = lone.clock.time
    missed = Limits(classes, {"short": 30 * MS, "medium": math.inf, "long": math.inf})
    served = lone.play.play(ROLLING, every_ms, missed)
    assert not missed.met_by(served) and sum(s.ttft is None for s in served) > 30
    assert lone.clock.time - begin < 0.2  # serving all takes 0.6 s


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("policy", [ROLLING, BALANCED])
def test_ranks_share_the_requests_and_see_all_of_them(tmp_path, num_ranks, policy):
    """Each rank's engine answers at once, so under least tokens too nobody has any waiting."""

    class Prompt:
        def __init__(self):
            self.prompts = []

        def submit(self, tokens):
            self.prompts.append(len(tokens))
            future = Future()
            future.set_result(SimpleNamespace(admitted=len(tokens), first_token=2.0 * len(tokens)))
            return future

        def statistics(self):
            return {}

    engines = [Prompt() for _ in range(num_ranks)]
    boards = [Board(tmp_path / "board", r, num_ranks, 64, create=r == 0) for r in range(num_ranks)]
    found = [None] * num_ranks

    def run(rank):
        @contextmanager
        def open_engine(policy, num_requests):
            engines[rank].prompts.clear()
            yield engines[rank]

        player = RankPlayer(boards[rank], open_engine, IDS)
        alone = player.alone(policy, [5, 6, 7])
        found[rank] = alone, player.play(policy, arrivals(*((0.0, 10 + n) for n in range(20))))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(f == found[0] for f in found) and found[0] is not None
    alone, served = found[0]
    assert [s.rank for s in alone] == [n % num_ranks for n in range(3)]
    assert sorted(tokens for e in engines for tokens in e.prompts) == [10 + n for n in range(20)]
    for s in served:
        assert s.num_tokens in engines[s.rank].prompts and s.first_token - s.admitted == pytest.approx(s.num_tokens)
    if policy is ROLLING:
        assert [s.rank for s in served] == [n % num_ranks for n in range(20)]
