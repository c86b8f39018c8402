"""The side channel: progress and failures between ranks (threads here) without MPI."""

import socket
import threading
import time

import pytest

from pipemoe.comm import side_channel
from pipemoe.comm.side_channel import SideChannel

WAIT_SECONDS = 20


def until(condition):
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def channels(monkeypatch):
    monkeypatch.setattr("pipemoe.comm.side_channel.GREETING_SECONDS", 0.2)
    made = [SideChannel(rank, 3, True, lambda rank=rank: {"step": rank, "ops": 10 * rank, "doing": "x"}, lambda: None) for rank in range(3)]
    addresses = [c.address() for c in made]
    threads = [threading.Thread(target=c.connect, args=(addresses, "secret", WAIT_SECONDS)) for c in made]
    stranger = socket.create_connection(addresses[0])
    stranger.sendall(b'{"token": "guess", "rank": 1}\n')  # must not take rank 1's place
    silent = socket.create_connection(addresses[0])  # must not keep the ranks waiting
    for t in threads:
        t.start()
    for t in threads:
        t.join(WAIT_SECONDS)
    yield made
    for c in made:
        c.close()
    stranger.close()
    silent.close()


def test_progress_reaches_every_peer(channels):
    for c in channels:
        until(lambda c=c: all(p.progress.get("ops") == 10 * r for r, p in c.peers.items()))
        assert c.failed() is None
    assert "rank 2: step 2, 20 operations done, x, heard 0." in channels[0].describe()


def test_a_failure_is_heard_with_its_reason(channels):
    channels[2].announce_failure("rank 2: out of luck")
    for c in channels[:2]:
        until(lambda c=c: c.failed() is not None)
        assert c.failed() == (2, "rank 2: out of luck")


def test_a_closed_socket_is_a_lost_peer_unless_it_said_good_bye(channels):
    channels[1].say_good_bye()
    until(lambda: channels[0].peers[1].left)
    for connection in channels[1]._sockets.values():
        connection.shutdown(socket.SHUT_RDWR)
    until(lambda: channels[0].peers[1].gone)
    assert channels[0].failed() is None and not channels[0].all_have_left()
    for connection in channels[2]._sockets.values():
        connection.shutdown(socket.SHUT_RDWR)
    until(lambda: channels[0].failed() is not None)
    assert channels[0].failed() == (2, "its process ended (connection closed)") and channels[0].all_have_left()


def test_a_reason_travels_with_the_good_bye(channels):
    channels[1].say_good_bye("ValueError: planted")
    for c in (channels[0], channels[2]):
        until(lambda c=c: c.peers[1].left)
        assert c.peers[1].reason == "ValueError: planted"


def test_news_add_up_and_outlive_the_good_bye(channels):
    channels[1].say_good_bye()
    channels[1].tell(exiting=True)
    channels[1].tell(ends_by="this")
    for c in (channels[0], channels[2]):
        until(lambda c=c: len(c.peers[1].news) == 2)
        assert c.peers[1].news == {"exiting": True, "ends_by": "this"} and c.peers[1].left and c.failed() is None


def test_a_closed_channel_gives_its_sockets_and_thread_back(channels):
    connections = list(channels[1]._sockets.values())
    channels[1].close()
    assert not channels[1]._thread.is_alive() and all(c.fileno() < 0 for c in connections)
    until(lambda: channels[0].peers[1].gone and channels[2].peers[1].gone)


def test_what_is_no_message_is_ignored(channels):
    next(iter(channels[1]._sockets.values())).sendall(b"\xff not json\n[1, 2]\n7\n")
    for _ in range(2):  # the channel still hears what comes after
        channels[0].peers[1].progress = {}
        until(lambda: channels[0].peers[1].progress.get("ops") == 10)
    assert channels[0].failed() is None


def test_other_hosts_are_not_sent_to_loopback(monkeypatch):
    """Debian's /etc/hosts names the host 127.0.1.1."""
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")

    class Probe:
        def __init__(self, *kind):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def connect(self, address):
            pass

        def getsockname(self):
            return "10.1.2.3", 1

    monkeypatch.setattr(socket, "socket", Probe)
    assert side_channel._own_address() == "10.1.2.3"
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.9.8.7")
    assert side_channel._own_address() == "10.9.8.7"
