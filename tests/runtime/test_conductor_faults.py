"""Which fault gets which name: what the conductor makes of errors, of peers, and of time. Peers are stand-ins."""

import subprocess
import sys
import threading
from concurrent.futures import Future

import pytest

from pipemoe.errors import FatalError, PeerLost, WatchdogTimeout
from pipemoe.runtime import conductor as conductor_module
from pipemoe.runtime.conductor import EXIT_CODE, Conductor

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


class LivingConductor(Conductor):
    """Does not end the process of the tests."""

    def _end_process(self):
        pass

    def _at_exit(self):
        pass


@pytest.fixture
def conductor():
    made = LivingConductor(0, watchdog_seconds=WAIT_SECONDS, grace_seconds=0.0)
    made.blame_peers_for(LibraryError)
    made.hear_peers_by(Channel())
    yield made
    made._tasks.put(None)


def error_of(conductor, task):
    return conductor.submit(task).exception(WAIT_SECONDS)


def fails(conductor, error):
    def task():
        conductor.note("dispatch 7")
        raise error

    return task


def test_a_library_that_fails_before_the_channel_knows_is_put_down_to_the_peer(conductor):
    conductor.hear_peers_by(Channel(None, None, None, (2, "its process ended")))
    error = error_of(conductor, fails(conductor, LibraryError("MPI_ERR_OTHER")))
    assert isinstance(error, PeerLost) and error.culprit == 2
    assert (
        str(error) == "rank 0: lost rank 2 (its process ended) during dispatch 7, where the library says: MPI_ERR_OTHER"
    )
    assert isinstance(error.__cause__, LibraryError)
    assert conductor.side_channel.announced == [(str(error), 2)]


def test_a_library_that_fails_for_a_rank_that_left(conductor):
    conductor.side_channel.peers[1].left, conductor.side_channel.peers[1].reason = True, "ValueError: why"
    error = error_of(conductor, fails(conductor, LibraryError("MPI_ERR_OTHER")))
    assert str(error).startswith(
        "rank 0: rank 1 has closed its world (ValueError: why), but dispatch 7 needs every rank; where the library"
    )
    assert error.culprit == 1


@pytest.mark.parametrize("has_channel", [True, False])
def test_a_library_that_fails_by_itself(conductor, has_channel):
    if not has_channel:
        conductor.hear_peers_by(None)
    error = error_of(conductor, fails(conductor, LibraryError("MPI_ERR_COUNT")))
    assert type(error) is FatalError and str(error) == "rank 0: LibraryError in dispatch 7: MPI_ERR_COUNT"
    assert error.culprit is None


@pytest.mark.parametrize(
    ("raised", "text"),
    [(ValueError("own"), "own"), (Unspeakable(), "(its own words cannot be had: __str__ raises RuntimeError)")],
)
def test_other_errors_are_this_ranks_own(conductor, raised, text):
    error = error_of(conductor, fails(conductor, raised))
    assert str(error) == f"rank 0: {type(raised).__name__} in dispatch 7: {text}" and conductor.side_channel.asked == 0


def test_a_lost_peer_is_named_with_what_is_waited_for_and_for_how_long(conductor):
    conductor.hear_peers_by(Channel(None, (1, "why")))
    error = error_of(conductor, lambda: conductor.wait(lambda: False, "exchange of step 2"))
    assert isinstance(error, PeerLost) and error.culprit == 1
    assert str(error).startswith("rank 0: lost rank 1 (why) during exchange of step 2, after 0.") and str(
        error
    ).endswith(" s of waiting")


def test_a_rank_that_left_is_named_with_its_reason(conductor, monkeypatch):
    monkeypatch.setattr(conductor_module, "_LEFT_SECONDS", 0.0)
    conductor.side_channel.peers[2].left, conductor.side_channel.peers[2].reason = True, "disk full"
    error = error_of(conductor, lambda: conductor.wait(lambda: False, "exchange of step 2", needs_all=True))
    assert str(error).startswith(
        "rank 0: rank 2 has closed its world (disk full), but exchange of step 2 needs every rank; waited 0."
    )
    assert error.culprit == 2


@pytest.mark.parametrize(
    ("silent", "culprit", "text"), [(None, None, "the peers"), ((2, 7.0), 2, "rank 2 says nothing, heard 7.0 s ago")]
)
def test_a_timeout_is_put_down_to_a_silent_peer(conductor, silent, culprit, text):
    conductor.side_channel.silent_peer = silent
    error = error_of(conductor, lambda: conductor.wait(lambda: False, "step 3", seconds=0.05))
    assert isinstance(error, WatchdogTimeout) and error.culprit == culprit
    assert (
        str(error).startswith("rank 0: no progress for 0.")
        and " s in step 3; peers: the peers" in str(error)
        and text in str(error)
    )
    assert conductor.side_channel.announced == [(str(error), culprit)]


def test_peers_in_their_first_step_are_waited_for_and_then_no_longer(conductor):
    conductor.side_channel.patiences = [WAIT_SECONDS] * 5 + [0.0]
    error = error_of(conductor, lambda: conductor.wait(lambda: False, "step 3", seconds=0.05))
    assert isinstance(error, WatchdogTimeout) and conductor.side_channel.patiences == [0.0]


def test_what_went_wrong_on_the_channels_thread_is_named(conductor):
    conductor.side_channel.error = KeyError("planted")
    error = error_of(conductor, lambda: conductor.wait(lambda: False, "step 3"))
    assert (
        str(error) == "rank 0: KeyError on the side channel's thread: 'planted'"
        and error.__cause__ is conductor.side_channel.error
    )


@pytest.mark.parametrize(
    ("lost", "kind", "text"),
    [((1, "why"), PeerLost, "lost rank 1 (why) during Dup, in one call for"), (None, WatchdogTimeout, "stuck for")],
)
def test_a_call_that_does_not_return_is_ended(conductor, monkeypatch, lost, kind, text):
    monkeypatch.setattr(conductor_module, "_IN_CALL_SECONDS", 0.0)
    conductor.hear_peers_by(Channel(lost))
    begun, release = threading.Event(), threading.Event()

    def task():
        conductor.note("Dup", 1e-9 if lost is None else None)
        begun.set()
        release.wait(WAIT_SECONDS)

    future = conductor.submit(task)
    assert begun.wait(WAIT_SECONDS)
    while not future.done():  # as the channel's thread does
        conductor.watch()
    release.set()
    assert isinstance(future.exception(), kind) and text in str(future.exception())


def test_an_idle_conductor_is_not_ended(conductor):
    conductor.hear_peers_by(Channel((1, "why")))
    assert isinstance(conductor.submit(lambda: None), Future)
    while conductor._alive is not None:
        pass
    conductor.watch()
    assert conductor.failure is None


PROGRAM = """
import os, sys, time
from pipemoe.errors import FatalError
from pipemoe.runtime.conductor import Conductor

class Channel:
    def announce_failure(self, text, culprit):
        time.sleep(0.3)  # a peer that is slow to take it
        os.write(said, text.encode())

said = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
conductor = Conductor(0, watchdog_seconds=5.0, grace_seconds=0.0)
conductor.hear_peers_by(Channel())
conductor.submit(lambda: conductor.fail(FatalError("planted")))
if sys.argv[2] == "ends":
    while conductor.failure is None:
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
