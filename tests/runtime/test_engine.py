"""The engine by itself: what its futures get, what a failure sets going, and what ends a wait.

No process ends here: see tests/faults and test_broken_output.py for that.
"""

import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from pipemoe.errors import FatalError, InputError, PeerLost, WatchdogTimeout
from pipemoe.runtime import engine as engine_module
from pipemoe.runtime.engine import Engine

PATIENCE = 30  # seconds for a thread that is to do something: only a fault takes so long
WATCHDOG_SECONDS = 5.0


class SideChannel:
    """What an engine asks of its side channel; `peers` says who has left."""

    def __init__(self, lost=None, left=()):
        self.announced, self._lost, self.error = [], lost, None
        self.peers = {rank: SimpleNamespace(left=rank in left, reason="") for rank in (1, 2)}
        self.said_good_bye = threading.Event()

    def announce_failure(self, text, culprit):
        self.announced.append(text)

    def failed(self):
        return self._lost

    def describe(self):
        return "rank 1: step 3"

    def silent(self):
        return None

    def patience(self):
        return 0.0

    def say_good_bye(self, reason):
        self.said_good_bye.set()

    def all_have_left(self):
        return True


@pytest.fixture
def make_engine(monkeypatch):
    """Engines of which none ends this process: not after its grace, and not at exit."""
    monkeypatch.setattr("atexit.register", lambda *arguments: None)
    made = []

    def make(side_channel=None, **options):
        made.append(Engine(3, watchdog_seconds=WATCHDOG_SECONDS, grace_seconds=1e6, **options))
        made[-1].side_channel = side_channel
        return made[-1]

    yield make
    for engine in made:
        closing = threading.Thread(target=engine.close, daemon=True)
        closing.start()
        closing.join(PATIENCE)


@pytest.fixture
def clock(monkeypatch):
    """The engine's clock; it stands still until a test moves it."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(engine_module.time, "monotonic", lambda: clock.now)
    return clock


def call(engine, task):
    """As engine.call, but not for ever."""
    return engine.submit(task).result(PATIENCE)


def test_tasks_run_one_after_another_on_the_thread_that_was_set_up(make_engine):
    threads, order = [], []
    engine = make_engine(set_up_thread=lambda: threads.append(threading.get_ident()))
    futures = [engine.submit(lambda n=n: order.append((n, threading.get_ident())) or n) for n in range(5)]
    assert [f.result(PATIENCE) for f in futures] == list(range(5)) and engine.call(threading.get_ident) == threads[0]
    assert order == [(n, threads[0]) for n in range(5)] and threads[0] != threading.get_ident()


def test_a_task_may_resolve_its_future_early(make_engine):
    engine, future, go_on = make_engine(), Future(), threading.Event()

    def task():
        future.set_result("early")
        go_on.wait(PATIENCE)
        return "late"

    assert engine.submit(task, future).result(PATIENCE) == "early"
    go_on.set()
    assert call(engine, lambda: "next") == "next" and future.result() == "early"


def test_errors_of_the_library_are_the_callers_alone(make_engine):
    engine = make_engine()

    def task():
        raise InputError("rank 3: bad x")

    with pytest.raises(InputError, match="bad x"):
        call(engine, task)
    assert engine.failure is None and call(engine, lambda: 1) == 1


@pytest.mark.parametrize("how", ["fail", "task", "other error"])
def test_a_failure_aborts_tells_the_peers_and_settles_every_future(make_engine, how, capfd):
    channel, aborted, begun, go_on = SideChannel(), threading.Semaphore(0), threading.Event(), threading.Event()
    engine = make_engine(channel)
    hangs = threading.Event()
    engine.on_failure += [
        lambda: hangs.wait(PATIENCE),
        aborted.release,
        aborted.release,
    ]  # the first one may block: the others run all the same
    error = ValueError("planted") if how == "other error" else FatalError("rank 3: planted")

    def task():
        begun.set()
        go_on.wait(PATIENCE)
        engine.note("something")
        if how != "fail":
            raise error

    futures = [engine.submit(task), engine.submit(lambda: None)]
    assert begun.wait(PATIENCE)
    if how == "fail":
        engine.fail(error)  # of another thread, while the engine's own is in a call
        assert all(f.exception(0) is error for f in futures)
    go_on.set()
    for future in futures:
        assert "planted" in str(future.exception(PATIENCE)) and isinstance(future.exception(), FatalError)
    assert all(aborted.acquire(timeout=PATIENCE) for _ in range(2))
    hangs.set()
    assert channel.announced == [str(engine.failure)] and f"FatalError: {engine.failure}" in capfd.readouterr().err
    assert (str(engine.failure) == "rank 3: ValueError in something: planted") == (how == "other error")
    assert engine.submit(lambda: None).exception(0) is engine.failure  # handed in later
    engine.fail(FatalError("a second one"))
    assert "planted" in str(engine.failure) and len(channel.announced) == 1


def test_watch_ends_a_call_that_is_stuck(make_engine, clock):
    """The error is there while the call still hangs; a call that has said it may take longer has longer."""
    engine, aborted, doing, go_on = make_engine(SideChannel()), threading.Event(), threading.Event(), threading.Event()
    engine.on_failure.append(aborted.set)

    def task(seconds):
        engine.note("a long call", seconds)
        doing.set()
        go_on.wait(PATIENCE)

    patient = engine.submit(lambda: task(100.0))
    assert doing.wait(PATIENCE)
    clock.now += 100.5
    engine.watch()
    assert engine.failure is None
    go_on.set()
    patient.result(PATIENCE)
    call(engine, lambda: None)  # the engine's thread has left the patient call
    doing.clear()
    go_on.clear()
    stuck = engine.submit(lambda: task(None))
    assert doing.wait(PATIENCE)
    clock.now += WATCHDOG_SECONDS
    engine.watch()
    assert engine.failure is None
    clock.now += 1.5
    engine.watch()
    with pytest.raises(WatchdogTimeout, match=r"rank 3: stuck for 6\.5 s in a long call; peers: rank 1: step 3"):
        stuck.result(0)
    assert aborted.wait(PATIENCE)
    go_on.set()


def test_watch_lets_an_idle_engine_be(make_engine, clock):
    engine = make_engine(SideChannel())
    call(engine, lambda: engine.note("work"))
    call(engine, lambda: None)
    clock.now += 1e6
    engine.watch()
    assert engine.failure is None and call(engine, lambda: 1) == 1 and engine.progress()["doing"] == "idle"


def test_a_wait_ends_without_progress_but_not_with_it(make_engine, clock):
    engine = make_engine(SideChannel())
    polls = iter(range(16))

    def goes_on():
        clock.now += WATCHDOG_SECONDS / 2
        poll = next(polls, None)
        engine.ops_done += poll in range(0, 16, 2)  # nothing at every second poll, but never for long
        return poll is None

    call(engine, lambda: engine.wait(goes_on, "going on"))

    def stands_still():
        clock.now += 1.0
        return False

    with pytest.raises(WatchdogTimeout, match=r"rank 3: no progress for 6\.0 s in standing; peers: rank 1: step 3"):
        call(engine, lambda: engine.wait(stands_still, "standing"))
    assert isinstance(engine.failure, WatchdogTimeout)


def test_a_wait_has_the_seconds_it_asks_for(make_engine, clock):
    engine, polls = make_engine(), iter(range(8))

    def ready():
        clock.now += WATCHDOG_SECONDS
        return next(polls, None) is None

    call(engine, lambda: engine.wait(ready, "set-up", seconds=9 * WATCHDOG_SECONDS))
    with pytest.raises(WatchdogTimeout, match="set-up"):
        polls = iter(range(8))
        call(engine, lambda: engine.wait(ready, "set-up", seconds=6 * WATCHDOG_SECONDS))


def test_wake_ends_a_pause(make_engine):
    engine = make_engine()
    engine.wake.set()
    news = iter((False, True))
    call(engine, lambda: engine.wait(lambda: next(news), "news"))
    assert not engine.wake._event.is_set()


def never():
    return False


def test_a_lost_peer_ends_a_wait(make_engine):
    engine = make_engine(SideChannel(lost=(2, "its process ended")))
    with pytest.raises(PeerLost, match=r"rank 3: lost rank 2 \(its process ended\) during a step"):
        call(engine, lambda: engine.wait(never, "a step"))


def test_a_peer_that_has_left_ends_a_wait_that_needs_all(make_engine, clock):
    engine, polls = make_engine(SideChannel(left=(2,))), iter(range(4))

    def ready():
        clock.now += 1.0
        return next(polls, None) is None

    call(engine, lambda: engine.wait(ready, "own work"))
    polls = iter(range(4))
    with pytest.raises(PeerLost, match="rank 2 has closed its world, but exchange needs every rank"):
        call(engine, lambda: engine.wait(ready, "exchange", needs_all=True))


def test_what_a_library_noticed_ends_a_wait(make_engine):
    engine = make_engine()

    def broken():
        raise OSError("network")

    engine.health.append(broken)
    with pytest.raises(FatalError, match="rank 3: OSError in a step: network"):
        call(engine, lambda: engine.wait(never, "a step"))


def test_closing_finishes_what_was_handed_in_then_leaves_then_refuses(make_engine):
    channel, done = SideChannel(), []
    engine = make_engine(channel)
    future = engine.submit(lambda: done.append("task"))
    engine.close(lambda: done.append(("last", channel.said_good_bye.is_set())))
    assert future.done() and done == ["task", ("last", True)]
    with pytest.raises(InputError, match="rank 3: the world is closed"):
        engine.submit(lambda: None).result(0)
