"""Which fault gets which name: what the engine makes of errors, of peers, and of time. Peers are stand-ins."""

import subprocess
import sys
import threading
from concurrent.futures import Future

import pytest

from pipemoe.errors import FatalError, PeerLost, WatchdogTimeout
from pipemoe.runtime import engine as engine_module
from pipemoe.runtime.engine import EXIT_CODE, Engine

WAIT_SECONDS = 60


class LibraryError(Exception):
    """As MPI's and NCCL's."""


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class Peer:
    left, reason = False, ""


class Channel:
    """`failures`: what `failed` answers, one after another; the last one stays."""

    def __init__(self, *failures):
        self.failures, self.peers, self.error = list(failures) or [None], {1: Peer(), 2: Peer()}, None
        self.silent_peer, self.patiences, self.announced, self.asked = None, [0.0], [], 0

    def failed(self):
        self.asked += 1
        return self.failures.pop(0) if len(self.failures) > 1 else self.failures[0]

    def patience(self):
        return self.patiences.pop(0) if len(self.patiences) > 1 else self.patiences[0]

    def silent(self):
        return self.silent_peer

    def describe(self):
        return "the peers"

    def announce_failure(self, text, culprit=None):
        self.announced.append((text, culprit))


class LivingEngine(Engine):
    """Does not end the process of the tests."""

    def _end_process(self):
        pass

    def _at_exit(self):
        pass


@pytest.fixture
def engine():
    made = LivingEngine(0, watchdog_seconds=WAIT_SECONDS, grace_seconds=0.0)
    made.blame_peers_for(LibraryError)
    made.side_channel = Channel()
    yield made
    made._tasks.put(None)


def error_of(engine, task):
    return engine.submit(task).exception(WAIT_SECONDS)


def fails(engine, error):
    def task():
        engine.note("dispatch 7")
        raise error

    return task


def test_a_library_that_fails_before_the_channel_knows_is_put_down_to_the_peer(engine):
    engine.hear_peers_by(Channel(None, None, None, (2, "its process ended")))
    error = error_of(engine, fails(engine, LibraryError("MPI_ERR_OTHER")))
    assert isinstance(error, PeerLost) and error.culprit == 2
    assert (
        str(error) == "rank 0: lost rank 2 (its process ended) during dispatch 7, where the library says: MPI_ERR_OTHER"
    )
    assert isinstance(error.__cause__, LibraryError)
    assert engine.side_channel.announced == [(str(error), 2)]


def test_a_library_that_fails_for_a_rank_that_left(engine):
    engine.side_channel.peers[1].left, engine.side_channel.peers[1].reason = True, "ValueError: why"
    error = error_of(engine, fails(engine, LibraryError("MPI_ERR_OTHER")))
    assert str(error).startswith(
        "rank 0: rank 1 has closed its world (ValueError: why), but dispatch 7 needs every rank; where the library"
    )
    assert error.culprit == 1


@pytest.mark.parametrize("has_channel", [True, False])
def test_a_library_that_fails_by_itself(engine, has_channel):
    if not has_channel:
        engine.side_channel = None
    error = error_of(engine, fails(engine, LibraryError("MPI_ERR_COUNT")))
    assert type(error) is FatalError and str(error) == "rank 0: LibraryError in dispatch 7: MPI_ERR_COUNT"
    assert error.culprit is None


@pytest.mark.parametrize(
    ("raised", "text"),
    [(ValueError("own"), "own"), (Unspeakable(), "(its own words cannot be had: __str__ raises RuntimeError)")],
)
def test_other_errors_are_this_ranks_own(engine, raised, text):
    error = error_of(engine, fails(engine, raised))
    assert str(error) == f"rank 0: {type(raised).__name__} in dispatch 7: {text}" and engine.side_channel.asked == 0


def test_a_lost_peer_is_named_with_what_is_waited_for_and_for_how_long(engine):
    engine.hear_peers_by(Channel(None, (1, "why")))
    error = error_of(engine, lambda: engine.wait(lambda: False, "exchange of step 2"))
    assert isinstance(error, PeerLost) and error.culprit == 1
    assert str(error).startswith("rank 0: lost rank 1 (why) during exchange of step 2, after 0.") and str(
        error
    ).endswith(" s of waiting")


def test_a_rank_that_left_is_named_with_its_reason(engine, monkeypatch):
    monkeypatch.setattr(engine_module, "_LEFT_SECONDS", 0.0)
    engine.side_channel.peers[2].left, engine.side_channel.peers[2].reason = True, "disk full"
    error = error_of(engine, lambda: engine.wait(lambda: False, "exchange of step 2", needs_all=True))
    assert str(error).startswith(
        "rank 0: rank 2 has closed its world (disk full), but exchange of step 2 needs every rank; waited 0."
    )
    assert error.culprit == 2


@pytest.mark.parametrize(
    ("silent", "culprit", "text"), [(None, None, "the peers"), ((2, 7.0), 2, "rank 2 says nothing, heard 7.0 s ago")]
)
def test_a_timeout_is_put_down_to_a_silent_peer(engine, silent, culprit, text):
    engine.side_channel.silent_peer = silent
    error = error_of(engine, lambda: engine.wait(lambda: False, "step 3", seconds=0.05))
    assert isinstance(error, WatchdogTimeout) and error.culprit == culprit
    assert (
        str(error).startswith("rank 0: no progress for 0.")
        and " s in step 3; peers: the peers" in str(error)
        and text in str(error)
    )
    assert engine.side_channel.announced == [(str(error), culprit)]


def test_peers_in_their_first_step_are_waited_for_and_then_no_longer(engine):
    engine.side_channel.patiences = [WAIT_SECONDS] * 5 + [0.0]
    error = error_of(engine, lambda: engine.wait(lambda: False, "step 3", seconds=0.05))
    assert isinstance(error, WatchdogTimeout) and engine.side_channel.patiences == [0.0]


def test_what_went_wrong_on_the_channels_thread_is_named(engine):
    engine.side_channel.error = KeyError("planted")
    error = error_of(engine, lambda: engine.wait(lambda: False, "step 3"))
    assert (
        str(error) == "rank 0: KeyError on the side channel's thread: 'planted'"
        and error.__cause__ is engine.side_channel.error
    )


@pytest.mark.parametrize(
    ("lost", "kind", "text"),
    [((1, "why"), PeerLost, "lost rank 1 (why) during Dup, in one call for"), (None, WatchdogTimeout, "stuck for")],
)
def test_a_call_that_does_not_return_is_ended(engine, monkeypatch, lost, kind, text):
    monkeypatch.setattr(engine_module, "_IN_CALL_SECONDS", 0.0)
    engine.hear_peers_by(Channel(lost))
    begun, release = threading.Event(), threading.Event()

    def task():
        engine.note("Dup", 1e-9 if lost is None else None)
        begun.set()
        release.wait(WAIT_SECONDS)

    future = engine.submit(task)
    assert begun.wait(WAIT_SECONDS)
    while not future.done():  # as the channel's thread does
        engine.watch()
    release.set()
    assert isinstance(future.exception(), kind) and text in str(future.exception())


def test_an_idle_engine_is_not_ended(engine):
    engine.hear_peers_by(Channel((1, "why")))
    assert isinstance(engine.submit(lambda: None), Future)
    while engine._alive is not None:
        pass
    engine.watch()
    assert engine.failure is None


PROGRAM = """
import os, sys, time
from pipemoe.errors import FatalError
from pipemoe.runtime.engine import Engine

class Channel:
    def announce_failure(self, text, culprit):
        time.sleep(0.3)  # a peer that is slow to take it
        os.write(said, text.encode())

said = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
engine = Engine(0, watchdog_seconds=5.0, grace_seconds=0.0)
engine.hear_peers_by(Channel())
engine.submit(lambda: engine.fail(FatalError("planted")))
if sys.argv[2] == "ends":
    while engine.failure is None:
        pass
    sys.exit(1)
time.sleep(60)
"""


@pytest.mark.parametrize("main_thread", ["sleeps", "ends"])
def test_the_peers_are_told_before_the_process_ends(tmp_path, main_thread):
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "said"), main_thread], timeout=WAIT_SECONDS, capture_output=True
    )
    assert process.returncode == EXIT_CODE
    assert (tmp_path / "said").read_text() == "planted"
