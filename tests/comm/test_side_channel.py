"""The side channel: progress and failures between ranks (threads here) without MPI."""

import json
import os
import signal
import socket
import threading
import time

import pytest

from pipemoe.comm import side_channel
from pipemoe.comm.lines import MAX_LINE
from pipemoe.comm.side_channel import SideChannel

WAIT_SECONDS = 60


def until(condition):
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def opened(size, progress=lambda rank: {"step": rank, "ops": 10 * rank, "doing": "x"}, tick=lambda: None):
    made = [SideChannel(rank, size, True, lambda rank=rank: progress(rank), tick) for rank in range(size)]
    addresses = [c.address() for c in made]
    threads = [threading.Thread(target=c.connect, args=(addresses, "secret", WAIT_SECONDS)) for c in made]
    for t in threads:
        t.start()
    for t in threads:
        t.join(WAIT_SECONDS)
    return made


@pytest.fixture
def channels():
    made = opened(4)
    yield made
    for c in made:
        c.close()


def end(channel):
    """As the kernel does for a process that was killed."""
    for link in channel._links.values():
        link.connection.shutdown(socket.SHUT_RDWR)


def test_progress_reaches_every_peer(channels):
    for c in channels:
        until(lambda c=c: all(p.progress.get("ops") == 10 * r for r, p in c.peers.items()))
        assert c.failed() is None and c.silent() is None and c.error is None
    assert "rank 2: step 2, 20 operations done, x, heard 0." in channels[0].describe()


def test_a_failure_is_heard_with_its_reason(channels):
    channels[2].announce_failure("rank 2: out of luck")
    for c in channels[:2]:
        until(lambda c=c: c.failed() is not None)
        assert c.failed() == (2, "rank 2: out of luck")


def test_news_add_up(channels):
    channels[1].tell(exiting=True)
    channels[1].tell(finalised=True, why="x")
    until(lambda: len(channels[0].peers[1].news) == 3)
    assert (
        channels[0].peers[1].news == {"exiting": True, "finalised": True, "why": "x"} and channels[0].failed() is None
    )


@pytest.mark.parametrize("unit", ["x", "\U0001f4a9", "\ud800"])
def test_a_failure_of_any_length_is_heard(channels, unit):
    channels[2].announce_failure("rank 2: why" + 10**6 * unit)
    until(lambda: channels[0].failed() is not None)
    assert channels[0].failed()[0] == 2 and channels[0].failed()[1].startswith("rank 2: why")


def test_a_closed_socket_is_a_lost_peer_unless_it_said_good_bye(channels):
    channels[1].say_good_bye("ValueError: why")
    until(lambda: channels[0].peers[1].left)
    assert channels[0].peers[1].reason == "ValueError: why"
    end(channels[1])
    until(lambda: channels[0].peers[1].gone)
    assert channels[0].failed() is None and not channels[0].all_have_left()
    for rank in (2, 3):
        end(channels[rank])
        until(lambda rank=rank: channels[0].peers[rank].gone)
    rank, why = channels[0].failed()
    assert rank == 2 and why.startswith("its process ended, connection closed; last heard 0.")
    assert channels[0].all_have_left()


def test_what_was_said_before_the_end_is_heard(channels):
    """A rank that says why and is gone at once; also to a peer that finds its connection broken while it sends."""
    for c in channels[:2]:
        c._closing = True  # nobody reads
        c._thread.join()
    channels[3].announce_failure("rank 3: why")
    channels[3].close()
    for c in channels[:2]:
        for _ in range(20):
            c._send(b'{"doing": "y"}\n')
        c._closing = False
        threading.Thread(target=c._run).start()
        until(lambda c=c: c.peers[3].gone)
        assert c.failed() == (3, "rank 3: why")


def test_a_rank_that_ends_for_another_is_not_blamed(channels):
    """Rank 2 ends for rank 3, and rank 1 for rank 2, in whatever order that is heard, and whether or not rank 3's end
    is seen here.
    """
    channels[1].announce_failure("rank 1: lost rank 2", culprit=2)
    until(lambda: channels[0].peers[1].failure is not None)
    assert channels[0].failed() == (2, "rank 1: lost rank 2")
    channels[2].announce_failure("rank 2: lost rank 3", culprit=3)
    until(lambda: channels[0].peers[2].failure is not None)
    assert channels[0].failed() == (3, "rank 2: lost rank 3")
    end(channels[3])
    until(lambda: channels[0].peers[3].gone)
    rank, why = channels[0].failed()
    assert rank == 3 and why.startswith("its process ended")


def test_of_two_that_are_lost_the_first_is_named(channels):
    end(channels[3])
    until(lambda: channels[0].peers[3].gone)
    channels[1].announce_failure("rank 1: some library says something")
    until(lambda: channels[0].peers[1].failure is not None)
    assert channels[0].failed()[0] == 3


def test_ranks_that_blame_one_another_or_this_one_are_named_themselves(channels):
    channels[1].announce_failure("rank 1: lost rank 0", culprit=0)
    until(lambda: channels[0].failed() is not None)
    assert channels[0].failed() == (1, "rank 1: lost rank 0")
    channels[2].announce_failure("rank 2: lost rank 3", culprit=3)
    channels[3].announce_failure("rank 3: lost rank 2", culprit=2)
    until(lambda: all(channels[0].peers[rank].failure for rank in (2, 3)))
    channels[0].peers[1].failure = None
    assert channels[0].failed()[0] in (2, 3)


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
    connections = [link.connection for link in channels[1]._links.values()]
    channels[1].close()
    assert not channels[1]._thread.is_alive() and all(c.fileno() < 0 for c in connections)
    until(lambda: channels[0].peers[1].gone and channels[2].peers[1].gone)


def test_what_is_no_message_is_ignored(channels):
    raw = channels[1]._links[0].connection
    odd = [
        b"\xff not json",
        b"[1, 2]",
        b"7",
        b"[" * 60_000,
        b'{"failure": ["list"]}',
        b'{"failure": null}',
        b'{"left": 1}',
        b'{"step": "x", "doing": [[[]]], "patience": "1"}',
    ]
    raw.setblocking(True)
    with channels[1]._lock:
        raw.sendall(b"\n".join(odd) + b"\n" + b"y" * (3 * MAX_LINE) + b"\n")
        raw.setblocking(False)
    for _ in range(2):  # the channel still hears what comes after
        channels[0].peers[1].progress = {}
        until(lambda: channels[0].peers[1].progress.get("ops") == 10)
    assert channels[0].failed() is None and not channels[0].peers[1].left and channels[0].patience() == 0.0
    assert "rank 1: step 1, 10 operations done" in channels[0].describe()


def test_a_peer_that_does_not_read_holds_up_nobody_and_gets_whole_lines(channels, monkeypatch):
    """As a stopped one: its connection takes nothing for a while."""
    monkeypatch.setattr(side_channel, "FLUSH_SECONDS", 0.1)
    channels[1]._closing = True
    channels[1]._thread.join()
    link = channels[0]._links[1]
    link.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    while not link.outbox:
        channels[0]._send(b'{"doing": "%s"}\n' % (b"z" * 30_000))
    channels[0].announce_failure("rank 0: why")
    until(lambda: channels[2].failed() == (0, "rank 0: why"))
    channels[1]._closing = False
    threading.Thread(target=channels[1]._run).start()
    until(lambda: channels[1].failed() == (0, "rank 0: why"))


def test_what_raises_on_its_thread_does_not_end_the_heartbeat():
    beats = []

    def progress(rank):
        beats.append(rank)
        if rank == 1:
            raise ZeroDivisionError("planted")
        return {"step": len(beats), "doing": "x"}

    def tick():
        raise KeyError("planted")

    made = opened(2, progress, tick)
    try:
        until(lambda: made[1].peers[0].progress.get("step", 0) > 10)
        until(lambda: made[0].peers[1].progress.get("doing") == "unknown (ZeroDivisionError)")
        assert all(isinstance(c.error, KeyError) and c.failed() is None for c in made)
    finally:
        for c in made:
            c.close()


def test_what_ends_its_thread_is_kept(monkeypatch):
    monkeypatch.setattr(SideChannel, "_hear", lambda *arguments: json.loads("["))
    made = opened(2)
    try:
        until(lambda: all(isinstance(c.error, ValueError) for c in made))
    finally:
        for c in made:
            c.close()


def test_a_silent_peer_is_told_from_a_slow_one(channels, monkeypatch):
    until(lambda: channels[0].peers[2].progress)
    monkeypatch.setattr(side_channel, "SILENT_SECONDS", 0.0)  # all but those heard this instant
    channels[2]._closing = True
    channels[2]._thread.join()
    until(lambda: (channels[0].silent() or (None,))[0] == 2)
    assert "rank 2: step 2, 20 operations done, x, heard" in channels[0].describe()


def test_closing_gives_everything_back(channels):
    for c in channels:
        c.close()
        assert not c._thread.is_alive()
        assert c._listener.fileno() == -1 and all(link.connection.fileno() == -1 for link in c._links.values())
        c.say_good_bye()  # too late, and no error


def test_across_hosts_it_listens_on_the_address_that_it_tells(monkeypatch):
    monkeypatch.setattr(side_channel, "own_address", lambda: "127.0.0.7")
    channel = SideChannel(0, 2, False, dict, lambda: None)
    host, port = channel.address()
    assert host == "127.0.0.7"
    socket.create_connection((host, port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    channel.close()


@pytest.mark.parametrize(
    ("told", "wanted"), [(600, 600), (600.5, 600.5), (None, 0.0), (float("nan"), 0.0), (float("inf"), 0.0), ("9", 0.0)]
)
def test_peers_may_ask_for_patience_within_reason(told, wanted):
    made = opened(2, lambda rank: {"step": 1, "patience": told if rank else 0.0})
    try:
        until(lambda: made[0].peers[1].progress.get("step") == 1)
        assert made[0].patience() == wanted
    finally:
        for c in made:
            c.close()


def test_a_child_of_a_rank_does_not_keep_its_connections_open(channels):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        for c in channels:
            c.disown()
        os.read(read, 1)  # until it is killed
        os._exit(1)
    try:
        channels[1].close()
        until(lambda: channels[0].peers[1].gone)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def test_of_many_peers_those_furthest_behind_are_named():
    channel = SideChannel(0, 257, True, dict, lambda: None)
    try:
        for rank, peer in channel.peers.items():
            peer.progress = {"step": 7, "ops": 100 + rank, "doing": "combine(cohort 0, layer 3, wave 0)"}
        channel.peers[200].progress["ops"] = 3
        channel.peers[201].progress = {}  # has said nothing yet
        channel.peers[90].heard -= 60
        text = channel.describe()
    finally:
        channel.close()
    assert "rank 200: step 7, 3 operations" in text and "rank 201: step ?" in text and "rank 90: " in text
    assert text.endswith("; and 248 others, which are as far or further") and "rank 256:" not in text
    assert len(text) < 1000
