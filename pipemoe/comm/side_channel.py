"""A side channel that is not MPI: TCP between every two ranks, for progress counters and failures.

MPI and NCCL say nothing when a peer dies on NVLink or stops; a socket does: end of file at once when the process is gone, and
silence when it hangs. Each rank tells its peers every quarter of a second how far it is; when something goes wrong the
message about it can name who is behind. Messages are JSON lines, nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

HEARTBEAT_SECONDS = 0.25
GREETING_SECONDS = 2.0
MAX_LINE = 1 << 16


@dataclass
class Peer:
    """What is known of another rank."""

    heard: float = field(default_factory=time.monotonic)  # when it last said something
    progress: dict = field(default_factory=dict)  # its last heartbeat: step, ops, doing
    failure: str | None = None  # why it is ending, in its own words
    gone: bool = False  # its socket closed
    left: bool = False  # it said good-bye: a socket that closes afterwards is no failure
    reason: str = ""  # why it left, if it said so
    news: dict = field(default_factory=dict)  # what else it told


class SideChannel:
    """Full mesh of TCP connections, served by one daemon thread per rank."""

    def __init__(self, rank: int, size: int, one_host: bool, progress: Callable[[], dict], tick: Callable[[], None]) -> None:
        """one_host: all ranks are on this host, so listen on loopback only. progress: what to tell the peers. tick: called about
        every quarter of a second on the channel's own thread, so that an engine thread stuck in a library call is noticed too."""
        self.rank, self.size = rank, size
        self.peers = {r: Peer() for r in range(size) if r != rank}
        self._progress, self._tick = progress, tick
        self._sockets: dict[int, socket.socket] = {}
        self._buffers: dict[int, bytes] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="pipemoe side channel", daemon=True)
        self._host = "127.0.0.1" if one_host else _own_address()
        self._listener = socket.create_server(("127.0.0.1" if one_host else "", 0), backlog=max(size, 8))

    def address(self) -> tuple[str, int]:
        """Where peers reach this rank."""
        return self._host, self._listener.getsockname()[1]

    def connect(self, addresses: list[tuple[str, int]], token: str, timeout: float) -> None:
        """Connect to every lower rank and accept every higher one; `token` (the same on all ranks) keeps strangers out."""
        deadline = time.monotonic() + timeout
        for peer in range(self.rank):
            connection = socket.create_connection(addresses[peer], timeout=timeout)
            connection.sendall(json.dumps({"token": token, "rank": self.rank}).encode() + b"\n")
            self._add(peer, connection)
        while len(self._sockets) < self.size - 1:
            self._listener.settimeout(max(0.01, deadline - time.monotonic()))
            connection, _ = self._listener.accept()
            connection.settimeout(GREETING_SECONDS)  # a stranger that says nothing must not keep the ranks waiting
            peer = _greeting(connection, token)
            if peer in self.peers and peer not in self._sockets:
                self._add(peer, connection)
            else:
                connection.close()
        self._listener.close()
        self._thread.start()

    def _add(self, peer: int, connection: socket.socket) -> None:
        connection.settimeout(1.0)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets[peer], self._buffers[peer] = connection, b""

    def announce_failure(self, text: str) -> None:
        """Tell every peer that this rank is ending, and why."""
        self._send({"failure": text})

    def say_good_bye(self, reason: str = "") -> None:
        """Tell every peer that this rank takes part in nothing more, so that none waits for it or takes its closed socket for a failure.

        reason: why, where it is not that all is done.
        """
        self._send({"left": True, "reason": reason})

    def tell(self, **news: str | bool) -> None:
        """Tell every peer something that is no step's matter, and outlives the world: it adds to what its `Peer.news` holds."""
        self._send({"news": news})

    def all_have_left(self) -> bool:
        """Has every peer said good-bye, or ended?"""
        return all(peer.left or peer.gone for peer in self.peers.values())

    def close(self) -> None:
        """Say nothing more, and give everything back."""
        self._closing = True
        if self._thread.is_alive():
            self._thread.join(1.0)
        self.disown()

    def disown(self) -> None:
        """Let go of the sockets, as in a process forked from this one: its copies would keep them open when this one ends."""
        self._closing = True
        self._listener.close()
        for connection in self._sockets.values():
            connection.close()

    def failed(self) -> tuple[int, str] | None:
        """The first peer known to be lost, and why."""
        for rank, peer in self.peers.items():
            if peer.failure is not None:
                return rank, peer.failure
        for rank, peer in self.peers.items():
            if peer.gone and not peer.left:
                return rank, "its process ended (connection closed)"
        return None

    def describe(self) -> str:
        """One line per peer: how far it is and when it was last heard."""
        now = time.monotonic()
        lines = []
        for rank, peer in sorted(self.peers.items()):
            p = peer.progress
            lines.append(f"rank {rank}: step {p.get('step', '?')}, {p.get('ops', '?')} operations done, {p.get('doing', '?')}, heard {now - peer.heard:.1f} s ago")
        return "; ".join(lines)

    def _send(self, message: dict) -> None:
        line = json.dumps(message).encode()[: MAX_LINE - 1] + b"\n"
        with self._lock:
            for rank, connection in list(self._sockets.items()):
                try:
                    connection.sendall(line)
                except TimeoutError:
                    continue  # it does not read: stopped, not gone
                except OSError:
                    self._drop(rank)

    def _drop(self, rank: int) -> None:
        self.peers[rank].gone = True

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            self._serve_until_closed(selector)

    def _serve_until_closed(self, selector: selectors.BaseSelector) -> None:
        for rank, connection in self._sockets.items():
            selector.register(connection, selectors.EVENT_READ, rank)
        beat = 0.0
        while not self._closing:
            if time.monotonic() >= beat:
                self._send(self._progress())
                self._tick()
                beat = time.monotonic() + HEARTBEAT_SECONDS
            for key, _ in selector.select(timeout=HEARTBEAT_SECONDS / 5):
                rank = key.data
                try:
                    data = key.fileobj.recv(MAX_LINE)
                except TimeoutError:
                    continue
                except OSError:
                    data = b""
                if not data:
                    selector.unregister(key.fileobj)
                    self._drop(rank)
                    continue
                *lines, self._buffers[rank] = (self._buffers[rank] + data).split(b"\n")
                for line in lines:
                    self._hear(rank, line)

    def _hear(self, rank: int, line: bytes) -> None:
        peer = self.peers[rank]
        peer.heard = time.monotonic()
        try:
            message = json.loads(line)
        except ValueError:
            return
        if not isinstance(message, dict):
            return
        if "failure" in message:
            peer.failure = str(message["failure"])
        elif message.get("left"):
            peer.reason = str(message.get("reason", ""))
            peer.left = True
        elif isinstance(message.get("news"), dict):
            peer.news.update(message["news"])
        else:
            peer.progress = message


def _greeting(connection: socket.socket, token: str) -> int | None:
    """The rank that a new connection says it is, or None for a stranger."""
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < 512:
            more = connection.recv(1)
            if not more:
                return None
            data += more
        hello = json.loads(data)
        return hello["rank"] if hello.get("token") == token else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _own_address() -> str:
    """The address under which other hosts reach this one: that of its own name, unless it resolves to loopback, as on Debian; then
    that of the interface of the default route."""
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
        if not address.startswith("127."):
            return address
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it only chooses a route
        return probe.getsockname()[0]
    return "127.0.0.1"
