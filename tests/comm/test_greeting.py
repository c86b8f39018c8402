"""How ranks meet (threads here), whoever else knocks."""

import contextlib
import hmac
import json
import socket
import struct
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipemoe.comm import greeting
from pipemoe.comm.greeting import _ANSWER, _HELLO, _MAGIC, meet, proof
from pipemoe.errors import PeerLost

WAIT_SECONDS = 60
TOKEN = "0123456789abcdef0123456789abcdef"


class Job:
    """Ranks that listen from the start, and meet once told to."""

    def __init__(self, size, token_of=lambda rank: TOKEN):
        self.listeners = [socket.create_server(("127.0.0.1", 0), backlog=200) for _ in range(size)]
        self.addresses = [listener.getsockname() for listener in self.listeners]
        self.met, self.errors = {}, {}
        self._token_of, self._threads, self._strangers = token_of, [], []

    def begin(self, ranks=None, seconds=WAIT_SECONDS):
        for rank in range(len(self.listeners)) if ranks is None else ranks:
            self._threads.append(threading.Thread(target=self._meet, args=(rank, seconds), daemon=True))
            self._threads[-1].start()

    def _meet(self, rank, seconds):
        try:
            self.met[rank] = meet(rank, self.listeners[rank], self.addresses, self._token_of(rank), seconds)
        except PeerLost as error:
            self.errors[rank] = error

    def end(self):
        for thread in self._threads:
            thread.join(2 * WAIT_SECONDS)
            assert not thread.is_alive()

    def stranger(self, rank):
        self._strangers.append(socket.create_connection(self.addresses[rank], timeout=WAIT_SECONDS))
        return self._strangers[-1]

    def close(self):
        for connection in [*self.listeners, *self._strangers, *(c for of in self.met.values() for c in of.values())]:
            connection.close()


@pytest.fixture
def job():
    made = []

    def make(*arguments):
        made.append(Job(*arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()


def answer(rank, peer, hello, nonce=b"n" * 32, token=TOKEN):
    """What rank `peer` answers the hello of rank `rank`."""
    magic, their_nonce = _HELLO.unpack(hello)
    assert magic == _MAGIC
    return _ANSWER.pack(_MAGIC, peer, nonce, proof(token, "higher", rank, peer, their_nonce + nonce))


def is_shown_out(connection):
    """Waits for what comes; True if that is only the end."""
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


def test_the_right_ranks_are_connected(job):
    ranks = job(4)
    ranks.begin()
    ranks.end()
    for rank in range(4):
        assert set(ranks.met[rank]) == set(range(4)) - {rank}
        for peer, connection in ranks.met[rank].items():
            connection.sendall(b"%d %d;" % (rank, peer))
    for rank in range(4):
        for peer, connection in ranks.met[rank].items():
            connection.setblocking(True)
            assert connection.recv(4) == b"%d %d;" % (peer, rank)


def test_strangers_hold_up_nobody(job, monkeypatch):
    """Silent ones, more than are kept; one that feeds a byte at a time for as long as the ranks would let it; and one
    who reads along.
    """
    monkeypatch.setattr(greeting, "GREETING_SECONDS", 10 * WAIT_SECONDS)  # so that time does not help the ranks
    monkeypatch.setattr(greeting, "MOST_GUESTS", 8)
    ranks = job(3)
    silent = [ranks.stranger(0) for _ in range(20)]
    ranks.begin([0])
    for connection in silent[:9]:  # rank 0 keeps 8, and one for each rank of the job, while it waits for the others
        while connection.recv(100):  # the hello, then the end
            pass
    slow = ranks.stranger(0)
    slow.sendall(b"{")
    ranks.begin([1, 2])
    ranks.end()
    assert len(ranks.met) == 3 and not ranks.errors
    for connection in [*silent[9:], slow]:
        while not is_shown_out(connection):
            pass


def test_one_clock_for_all_bytes_of_a_greeting(job, monkeypatch):
    monkeypatch.setattr(greeting, "GREETING_SECONDS", 0.3)
    ranks = job(2)
    slow = ranks.stranger(0)
    ranks.begin([0])
    slow.recv(_HELLO.size)
    said = 0
    with pytest.raises(OSError):  # it is told to go while it still speaks
        while True:
            said += slow.send(b"x")
            time.sleep(0.1)
    assert said < _ANSWER.size and not ranks.met
    ranks.begin([1])
    ranks.end()
    assert set(ranks.met) == {0, 1}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.binary(max_size=200), st.integers(0, _ANSWER.size - 1)), min_size=1, max_size=5))
def test_no_stranger_becomes_a_rank(job, attempts):
    """Random bytes, or a right answer of rank 1 with one byte changed."""
    ranks = job(2)
    strangers = [ranks.stranger(0) for _ in attempts]
    ranks.begin([0])
    for attempt, stranger in zip(attempts, strangers):
        hello = stranger.recv(_HELLO.size)
        if isinstance(attempt, int):
            wrong = bytearray(answer(0, 1, hello))
            wrong[attempt] ^= 1
            stranger.sendall(wrong)
            assert is_shown_out(stranger)
        else:
            stranger.sendall(attempt)
    assert not ranks.met
    ranks.begin([1])
    ranks.end()
    assert set(ranks.met) == {0, 1}


ODD_GREETINGS = [{"token": TOKEN, "rank": rank} for rank in (True, "1", [1], 1.0, -1, 0, 1, None, {"a": 1}, 10**30)]


def test_the_old_greeting_in_clear_is_a_strangers(job):
    ranks = job(2)
    lines = [json.dumps(odd).encode() + b"\n" for odd in ODD_GREETINGS] + [
        b"\xff\n",
        b"[" * 100_000 + b"\n",
        b"9" * 5000 + b"\n",
    ]
    strangers = [ranks.stranger(0) for _ in lines]
    ranks.begin([0])
    for line, stranger in zip(lines, strangers):
        stranger.recv(_HELLO.size)
        stranger.sendall(line.ljust(_ANSWER.size, b" "))
        assert is_shown_out(stranger)
    ranks.begin([1])
    ranks.end()
    assert set(ranks.met) == {0, 1}


@pytest.mark.parametrize("peer", [-1, 0, 1, 3, 2**62], ids=["negative", "lower", "its own", "too high", "far too high"])
def test_only_a_higher_rank_of_the_job_may_connect(job, peer):
    """Even with the token."""
    ranks = job(3)
    stranger = ranks.stranger(1)
    ranks.begin([1])
    stranger.sendall(answer(1, peer, stranger.recv(_HELLO.size)))
    assert is_shown_out(stranger)
    ranks.begin([0, 2])
    ranks.end()
    assert set(ranks.met) == {0, 1, 2}


def test_a_rank_may_connect_once(job):
    ranks = job(3)
    first, again = ranks.stranger(0), ranks.stranger(0)
    ranks.begin([0])
    first.sendall(answer(0, 1, first.recv(_HELLO.size)))
    assert len(first.recv(32)) == 32
    again.sendall(answer(0, 1, again.recv(_HELLO.size)))
    assert is_shown_out(again)


def test_the_token_does_not_travel_and_what_travels_is_of_no_use_again(job):
    """A relay between the ranks hears everything; neither said again, nor sent back, nor to another rank, does it open
    a door.
    """
    ranks = job(3)
    relay = socket.create_server(("127.0.0.1", 0))
    real, heard = ranks.addresses[0], []
    ranks.addresses = [relay.getsockname(), *ranks.addresses[1:]]  # all but rank 0 itself are told of the relay

    def pass_on(source, target):
        with contextlib.suppress(OSError):  # the relay has closed
            while data := source.recv(4096):
                heard.append(data)
                target.sendall(data)

    ranks.begin([0, 1])
    near, _ = relay.accept()
    with near, socket.create_connection(real) as far, relay:
        for work in (lambda: pass_on(near, far), lambda: pass_on(far, near)):
            threading.Thread(target=work, daemon=True).start()
        deadline = time.monotonic() + WAIT_SECONDS
        while len(b"".join(heard)) < _HELLO.size + _ANSWER.size + 32:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        said = b"".join(heard)
        assert TOKEN.encode() not in said and bytes.fromhex(TOKEN) not in said
        answers = [data for data in heard if len(data) == _ANSWER.size]
        for rank in (0, 1):  # as rank 1 once more, and as rank 1 (or 2) to another rank
            for replay in (answers[0], answers[0][:8] + struct.pack("<q", 2) + answers[0][16:]):
                stranger = socket.create_connection(real if rank == 0 else ranks.addresses[1])
                with stranger:
                    stranger.recv(_HELLO.size)
                    stranger.sendall(replay)
                    assert is_shown_out(stranger)
    for rank in (0, 1):  # what stands open is ended: the relay has closed
        assert rank not in ranks.met


def test_a_proof_is_for_one_role_two_ranks_and_two_nonces():
    right = proof(TOKEN, "higher", 0, 1, b"a" * 32 + b"b" * 32)
    others = [
        proof(TOKEN, "lower", 0, 1, b"a" * 32 + b"b" * 32),
        proof(TOKEN, "higher", 1, 0, b"a" * 32 + b"b" * 32),
        proof(TOKEN, "higher", 0, 2, b"a" * 32 + b"b" * 32),
        proof(TOKEN, "higher", 0, 1, b"b" * 32 + b"a" * 32),
        proof(TOKEN[:-1] + "0", "higher", 0, 1, b"a" * 32 + b"b" * 32),
    ]
    assert len({right, *others}) == 6 and not hmac.compare_digest(right, others[0])


def test_a_host_that_does_not_know_the_token_is_named(job, monkeypatch):
    monkeypatch.setattr(greeting, "_REFUSED_SECONDS", 0.1)
    ranks = job(2, lambda rank: TOKEN if rank else "another")
    impostor = ranks.listeners[0]
    ranks.begin([1])

    def pretend():
        while True:
            try:
                connection, _ = impostor.accept()
            except OSError:
                return
            with connection:
                connection.sendall(_HELLO.pack(_MAGIC, b"n" * 32))
                connection.recv(_ANSWER.size)
                connection.sendall(b"p" * 32)

    threading.Thread(target=pretend, daemon=True).start()
    ranks.end()
    host, port = ranks.addresses[0]
    assert f"rank 1: rank 0 cannot be reached at {host} port {port} (what answers there is no rank of this job" in str(
        ranks.errors[1]
    )
    assert ranks.errors[1].culprit == 0


def test_a_rank_that_refuses_is_named_soon(job, monkeypatch):
    monkeypatch.setattr(greeting, "_REFUSED_SECONDS", 0.1)
    ranks = job(2)
    ranks.listeners[0].close()
    ranks.begin([1])
    ranks.end()
    host, port = ranks.addresses[0]
    assert f"rank 0 cannot be reached at {host} port {port} (Connection refused)" in str(ranks.errors[1])
    assert "firewall" in str(ranks.errors[1]) and "PIPEMOE_INTERFACE" in str(ranks.errors[1])


def test_a_host_that_swallows_everything_is_named(job, monkeypatch):
    """A full backlog here, which Linux treats as a firewall treats what it drops: by saying nothing."""
    monkeypatch.setattr(greeting, "_SILENT_SECONDS", 0.3)
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    ranks = job(2)
    ranks.addresses[0] = full.getsockname()
    with full:
        fillers = []
        for _ in range(4):
            fillers.append(socket.socket())
            fillers[-1].setblocking(False)
            fillers[-1].connect_ex(ranks.addresses[0])
        ranks.begin([1])
        ranks.end()
        for filler in fillers:
            filler.close()
    assert "rank 0 cannot be reached" in str(ranks.errors[1]) and "no answer for" in str(ranks.errors[1])


def test_a_rank_that_does_not_come_is_named(job):
    """By both, also by one who is told by the other first."""
    for seconds in ((1.0, WAIT_SECONDS), (WAIT_SECONDS, 1.0)):
        ranks = job(3)
        ranks.begin([0], seconds[0])
        ranks.begin([2], seconds[1])
        ranks.end()
        (low_host, low_port), (host, port) = ranks.addresses[:2]
        absent = (
            f"rank 0: rank 1 has not connected to {low_host} port {low_port} "
            "within setup_seconds=1 (1 of 3 ranks have not)"
        )
        mute = f"rank 2: rank 1 cannot be reached at {host} port {port} (no answer, within setup_seconds=1)"
        first = seconds.index(1.0)
        assert (absent, mute)[first] in str(ranks.errors[2 * first])
        other = 2 - 2 * first
        assert str(ranks.errors[other]).startswith(
            f"rank {other}: rank 1 is lost, as rank {2 * first} says: {(absent, mute)[first]}"
        )
        assert ranks.errors[0].culprit == ranks.errors[2].culprit == 1


def test_a_rank_that_ends_while_the_others_meet_is_named_at_once(job):
    ranks = job(3)
    ranks.begin([0])
    dying = ranks.stranger(0)
    dying.sendall(answer(0, 2, dying.recv(_HELLO.size)))
    assert len(dying.recv(32)) == 32
    dying.close()
    ranks.end()
    assert "rank 0: rank 2 ended while the ranks were meeting" in str(ranks.errors[0])


def test_a_rank_that_was_taken_for_a_late_guest_connects_again(job, monkeypatch):
    """Rank 1 hears nothing for longer than a guest has; then all goes well."""
    monkeypatch.setattr(greeting, "_PAUSE_SECONDS", 0.0)
    ranks = job(2)
    early = ranks.listeners[0]
    ranks.begin([1])
    for _ in range(3):
        connection, _ = early.accept()
        connection.sendall(_HELLO.pack(_MAGIC, b"n" * 32))
        connection.close()
    ranks.begin([0])
    ranks.end()
    assert set(ranks.met) == {0, 1}
