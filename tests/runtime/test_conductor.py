"""The conductor by itself: what its futures get, what a failure sets going, and what ends a wait.

No process ends here: see tests/faults and test_broken_output.py for that.
"""

import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from pipemoe.errors import FatalError, InputError, PeerLost, WatchdogTimeout
from pipemoe.runtime import conductor as conductor_module
from pipemoe.runtime.conductor import Conductor

PATIENCE = 30  # seconds for a thread that is to do something: only a fault takes so long
WATCHDOG_SECONDS = 5.0


class SideChannel:
    """What a conductor asks of its side channel; `peers` says who has left."""

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
def make_conductor(monkeypatch):
    """Conductors of which none ends this process: not after its grace, and not at exit."""
    monkeypatch.setattr("atexit.register", lambda *arguments: None)
    made = []

    def make(side_channel=None, **options):
        made.append(Conductor(3, watchdog_seconds=WATCHDOG_SECONDS, grace_seconds=1e6, **options))
        made[-1].hear_peers_by(side_channel)
        return made[-1]

    yield make
    for conductor in made:
        closing = threading.Thread(target=conductor.close, daemon=True)
        closing.start()
        closing.join(PATIENCE)


@pytest.fixture
def clock(monkeypatch):
    """The conductor's clock; it stands still until a test moves it."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(conductor_module.time, "monotonic", lambda: clock.now)
    return clock


def call(conductor, task):
    """As conductor.call, but not for ever."""
    return conductor.submit(task).result(PATIENCE)


def test_tasks_run_one_after_another_on_the_thread_that_was_set_up(make_conductor):
    threads, order = [], []
    conductor = make_conductor(set_up_thread=lambda: threads.append(threading.get_ident()))
    futures = [conductor.submit(lambda n=n: order.append((n, threading.get_ident())) or n) for n in range(5)]
    assert [f.result(PATIENCE) for f in futures] == list(range(5)) and conductor.call(threading.get_ident) == threads[0]
    assert order == [(n, threads[0]) for n in range(5)] and threads[0] != threading.get_ident()


def test_a_task_may_resolve_its_future_early(make_conductor):
    conductor, future, go_on = make_conductor(), Future(), threading.Event()

    def task():
        future.set_result("early")
        go_on.wait(PATIENCE)
        return "late"

    assert conductor.submit(task, future).result(PATIENCE) == "early"
    go_on.set()
    assert call(conductor, lambda: "next") == "next" and future.result() == "early"


def test_errors_of_the_library_are_the_callers_alone(make_conductor):
    conductor = make_conductor()

    def task():
        raise InputError("rank 3: bad x")

    with pytest.raises(InputError, match="bad x"):
        call(conductor, task)
    assert conductor.failure is None and call(conductor, lambda: 1) == 1


@pytest.mark.parametrize("how", ["fail", "task", "other error"])
def test_a_failure_aborts_tells_the_peers_and_settles_every_future(make_conductor, how, capfd):
    channel, aborted, begun, go_on = SideChannel(), threading.Semaphore(0), threading.Event(), threading.Event()
    conductor = make_conductor(channel)
    hangs = threading.Event()
    conductor.on_failure += [
        lambda: hangs.wait(PATIENCE),
        aborted.release,
        aborted.release,
    ]  # the first one may block: the others run all the same
    error = ValueError("planted") if how == "other error" else FatalError("rank 3: planted")

    def task():
        begun.set()
        go_on.wait(PATIENCE)
        conductor.note("something")
        if how != "fail":
            raise error

    futures = [conductor.submit(task), conductor.submit(lambda: None)]
    assert begun.wait(PATIENCE)
    if how == "fail":
        conductor.fail(error)  # of another thread, while the conductor's own is in a call
        assert all(f.exception(0) is error for f in futures)
    go_on.set()
    for future in futures:
        assert "planted" in str(future.exception(PATIENCE)) and isinstance(future.exception(), FatalError)
    assert all(aborted.acquire(timeout=PATIENCE) for _ in range(2))
    hangs.set()
    assert (
        channel.announced == [str(conductor.failure)] and f"FatalError: {conductor.failure}" in capfd.readouterr().err
    )
    assert (str(conductor.failure) == "rank 3: ValueError in something: planted") == (how == "other error")
    assert conductor.submit(lambda: None).exception(0) is conductor.failure  # handed in later
    conductor.fail(FatalError("a second one"))
    assert "planted" in str(conductor.failure) and len(channel.announced) == 1


def test_watch_ends_a_call_that_is_stuck(make_conductor, clock):
    """The error is there while the call still hangs; a call that has said it may take longer has longer."""
    conductor, aborted, doing, go_on = (
        make_conductor(SideChannel()),
        threading.Event(),
        threading.Event(),
        threading.Event(),
    )
    conductor.on_failure.append(aborted.set)

    def task(seconds):
        conductor.note("a long call", seconds)
        doing.set()
        go_on.wait(PATIENCE)

    patient = conductor.submit(lambda: task(100.0))
    assert doing.wait(PATIENCE)
    clock.now += 100.5
    conductor.watch()
    assert conductor.failure is None
    go_on.set()
    patient.result(PATIENCE)
    call(conductor, lambda: None)  # the conductor's thread has left the patient call
    doing.clear()
    go_on.clear()
    stuck = conductor.submit(lambda: task(None))
    assert doing.wait(PATIENCE)
    clock.now += WATCHDOG_SECONDS
    conductor.watch()
    assert conductor.failure is None
    clock.now += 1.5
    conductor.watch()
    with pytest.raises(WatchdogTimeout, match=r"rank 3: stuck for 6\.5 s in a long call; peers: rank 1: step 3"):
        stuck.result(0)
    assert aborted.wait(PATIENCE)
    go_on.set()


def test_watch_lets_an_idle_conductor_be(make_conductor, clock):
    conductor = make_conductor(SideChannel())
    call(conductor, lambda: conductor.note("work"))
    call(conductor, lambda: None)
    clock.now += 1e6
    conductor.watch()
    assert conductor.failure is None and call(conductor, lambda: 1) == 1 and conductor.progress()["doing"] == "idle"


def test_a_wait_ends_without_progress_but_not_with_it(make_conductor, clock):
    conductor = make_conductor(SideChannel())
    polls = iter(range(16))

    def goes_on():
        clock.now += WATCHDOG_SECONDS / 2
        poll = next(polls, None)
        conductor.ops_done += poll in range(0, 16, 2)  # nothing at every second poll, but never for long
        return poll is None

    call(conductor, lambda: conductor.wait(goes_on, "going on"))

    def stands_still():
        clock.now += 1.0
        return False

    with pytest.raises(WatchdogTimeout, match=r"rank 3: no progress for 6\.0 s in standing; peers: rank 1: step 3"):
        call(conductor, lambda: conductor.wait(stands_still, "standing"))
    assert isinstance(conductor.failure, WatchdogTimeout)


def test_a_wait_has_the_seconds_it_asks_for(make_conductor, clock):
    conductor, polls = make_conductor(), iter(range(8))

    def ready():
        clock.now += WATCHDOG_SECONDS
        return next(polls, None) is None

    call(conductor, lambda: conductor.wait(ready, "set-up", seconds=9 * WATCHDOG_SECONDS))
    with pytest.raises(WatchdogTimeout, match="set-up"):
        polls = iter(range(8))
        call(conductor, lambda: conductor.wait(ready, "set-up", seconds=6 * WATCHDOG_SECONDS))


def test_wake_ends_a_pause(make_conductor):
    conductor = make_conductor()
    conductor.wake.set()
    news = iter((False, True))
    call(conductor, lambda: conductor.wait(lambda: next(news), "news"))
    assert not conductor.wake._event.is_set()


def never():
    return False


def test_a_lost_peer_ends_a_wait(make_conductor):
    conductor = make_conductor(SideChannel(lost=(2, "its process ended")))
    with pytest.raises(PeerLost, match=r"rank 3: lost rank 2 \(its process ended\) during a step"):
        call(conductor, lambda: conductor.wait(never, "a step"))


def test_a_peer_that_has_left_ends_a_wait_that_needs_all(make_conductor, clock):
    conductor, polls = make_conductor(SideChannel(left=(2,))), iter(range(4))

    def ready():
        clock.now += 1.0
        return next(polls, None) is None

    call(conductor, lambda: conductor.wait(ready, "own work"))
    polls = iter(range(4))
    with pytest.raises(PeerLost, match="rank 2 has closed its world, but exchange needs every rank"):
        call(conductor, lambda: conductor.wait(ready, "exchange", needs_all=True))


def test_what_a_library_noticed_ends_a_wait(make_conductor):
    conductor = make_conductor()

    def broken():
        raise OSError("network")

    conductor.health.append(broken)
    with pytest.raises(FatalError, match="rank 3: OSError in a step: network"):
        call(conductor, lambda: conductor.wait(never, "a step"))


def test_closing_finishes_what_was_handed_in_then_leaves_then_refuses(make_conductor):
    channel, done = SideChannel(), []
    conductor = make_conductor(channel)
    future = conductor.submit(lambda: done.append("task"))
    conductor.close(lambda: done.append(("last", channel.said_good_bye.is_set())))
    assert future.done() and done == ["task", ("last", True)]
    with pytest.raises(InputError, match="rank 3: the world is closed"):
        conductor.submit(lambda: None).result(0)
