"""A side channel that is not MPI: TCP between every two ranks, for progress counters and failures.

MPI and NCCL say nothing when a peer dies on NVLink or stops; a socket does: end of file at once when the process is
gone, and silence when it hangs. Each rank tells its peers every quarter of a second how far it is; when something goes
wrong the message about it can name who is behind. Messages are JSON lines (lines.py), nothing is ever unpickled.
"""

from __future__ import annotations

import math
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipemoe.comm.address import own_address
from pipemoe.comm.greeting import meet
from pipemoe.comm.lines import MAX_LINE, LineReader, Outbox, cut, decode_line, encode_line

HEARTBEAT_SECONDS = 0.25
FLUSH_SECONDS = 1.0  # for last words to leave this host
SILENT_SECONDS = 2.0  # a rank that was not heard for so long has stopped, or its host has gone
# what a heartbeat says
_PROGRESS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "ops": int,
    "doing": str,
    "patience": (int, float),
    "rounds": list,
}
_FLUSH_POLL_SECONDS = 0.005
_SHOWN_PEERS = 8  # in an error
_BACKLOG = 128  # connections that the kernel keeps until the ranks meet


@dataclass
class Peer:
    """What is known of another rank."""

    heard: float = field(default_factory=time.monotonic)  # when it last said something
    progress: dict = field(default_factory=dict)  # its last heartbeat: step, ops, doing
    failure: str | None = None  # why it is ending, in its own words
    culprit: int | None = None  # the rank that it ends for, if not for itself
    gone: bool = False  # its socket closed
    left: bool = False  # it said good-bye: a socket that closes afterwards is no failure
    reason: str = ""  # why it left, if it said so
    news: dict = field(default_factory=dict)  # what else it told
    lost_at: float = math.inf  # when its failure or its end was first seen

    @property
    def is_lost(self) -> bool:
        return self.failure is not None or (self.gone and not self.left)


@dataclass
class _Link:
    """The connection to a peer."""

    connection: socket.socket
    reader: LineReader = field(default_factory=LineReader)
    outbox: Outbox = field(default_factory=Outbox)


class SideChannel:
    """Full mesh of TCP connections, served by one daemon thread per rank."""

    def __init__(
        self,
        rank: int,
        size: int,
        one_host: bool,
        progress: Callable[[], dict],
        tick: Callable[[], None],
        on_rounds: Callable[[], None] = lambda: None,
    ) -> None:
        """one_host: all ranks are on this host, so listen on loopback; else on the one address that the others are
        told. progress: what to tell the peers. tick: called about every quarter of a second on the channel's own
        thread, so that a conductor stuck in a library call is noticed too. on_rounds: called there when a peer
        has told other rounds than before. Raises ConfigError if PIPEMOE_INTERFACE names no interface."""
        self.rank, self.size = rank, size
        self.peers = {r: Peer() for r in range(size) if r != rank}
        # What broke the channel's own thread, and perhaps with it the watch over the conductor.
        self.error: BaseException | None = None
        self._progress, self._tick, self._on_rounds = progress, tick, on_rounds
        self._links: dict[int, _Link] = {}
        self._lock = threading.Lock()  # of what is sent: failures come from any thread
        self._telling = threading.Lock()  # so that older progress is not told after newer
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="pipemoe side channel", daemon=True)
        self._listener = socket.create_server(("127.0.0.1" if one_host else own_address(), 0), backlog=_BACKLOG + size)

    def address(self) -> tuple[str, int]:
        """Where peers reach this rank."""
        return self._listener.getsockname()[:2]

    def connect(self, addresses: Sequence[tuple[str, int]], token: str, timeout: float) -> None:
        """Meet every other rank, in `timeout` seconds at most; `token` (the same on all ranks) keeps strangers out, and
        does not travel.

        Raises PeerLost, which names the rank that is not there and its address.
        """
        with self._listener:
            for peer, connection in meet(self.rank, self._listener, addresses, token, timeout).items():
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.peers[peer].heard = time.monotonic()
                self._links[peer] = _Link(connection)
        self._thread.start()

    def announce_failure(self, text: str, culprit: int | None = None) -> None:
        """Tell every peer that this rank ends, and why: its own failure, or that of rank `culprit`.

        Returns when the message has been sent, or after a second.
        """
        self._say_last({"failure": text, "culprit": culprit})

    def say_good_bye(self, reason: str = "") -> None:
        """Tell every peer that this rank leaves, so that none waits for it or takes its closed socket for a failure.

        reason: why, unless all work is done. Returns when the message has been sent, or after a second.
        """
        self._say_last({"left": True, "reason": reason})

    def tell(self, **news: str | bool) -> None:
        """Tell every peer something that concerns no step and outlives the world; `Peer.news` keeps it."""
        self._send(
            encode_line(
                {"news": {name: cut(value) if isinstance(value, str) else value for name, value in news.items()}}
            ),
            keep=True,
        )

    def tell_progress(self) -> None:
        """Tell every peer at once what the next heartbeat would say."""
        with self._telling:
            self._send(encode_line(self._progress()))

    def highest_round(self, engine: int, slot: int) -> int:
        """The highest round of an engine's slot to which a peer has posted, as far as this rank has heard."""
        told = [peer.progress.get("rounds", ()) for peer in self.peers.values()]
        levels = (of[slot + 1] for of in told if len(of) > slot + 1 and of[0] == engine)
        return max((level for level in levels if type(level) is int), default=0)

    def all_have_left(self) -> bool:
        """Has every peer said good-bye, or ended?"""
        return all(peer.left or peer.gone for peer in self.peers.values())

    def close(self) -> None:
        """Stop the heartbeat thread and close all sockets."""
        self._closing = True
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(FLUSH_SECONDS)
        self.disown()

    def disown(self) -> None:
        """Close the sockets. A forked process must do so too: its copies would keep them open when this one ends."""
        self._closing = True
        self._listener.close()
        for link in self._links.values():  # without the lock, which somebody may have held at the fork
            link.connection.close()

    def failed(self) -> tuple[int, str] | None:
        """The rank that was lost first, as far as this rank knows, and why; None if none is lost.

        A rank may say that it ends because of another. Then the other is named.
        """
        lost = [rank for rank, peer in self.peers.items() if peer.is_lost]
        if not lost:
            return None
        rank = min(lost, key=lambda r: self.peers[r].lost_at)
        why, seen = self._why(rank), {rank}
        while (culprit := self.peers[rank].culprit) in self.peers and culprit not in seen:
            rank = culprit
            seen.add(rank)
            why = self._why(rank) if self.peers[rank].is_lost else why
        return rank, why

    def _why(self, rank: int) -> str:
        peer = self.peers[rank]
        if peer.failure is not None:
            return peer.failure
        return f"its process ended, connection closed; last heard {time.monotonic() - peer.heard:.1f} s ago"

    def silent(self) -> tuple[int, float] | None:
        """The rank that has been silent for longest, and for how many seconds. None unless it must have stopped."""
        heard, rank = min(
            ((peer.heard, rank) for rank, peer in self.peers.items() if not peer.left), default=(math.inf, -1)
        )
        seconds = time.monotonic() - heard
        return (rank, seconds) if seconds > SILENT_SECONDS else None

    def patience(self) -> float:
        """The longest time, in seconds, that a live peer asks the others to wait for it."""
        now = time.monotonic()
        asked = [p.progress.get("patience", 0.0) for p in self.peers.values() if now - p.heard < SILENT_SECONDS]
        return max((seconds for seconds in asked if math.isfinite(seconds)), default=0.0)

    def describe(self) -> str:
        """How far the peers are and when they were last heard: of many, those furthest behind, and how many more there
        are.
        """
        now = time.monotonic()
        shown = sorted(self.peers, key=self._behind)[:_SHOWN_PEERS]
        lines = []
        for rank in sorted(shown):
            peer = self.peers[rank]
            p = peer.progress
            lines.append(
                f"rank {rank}: step {p.get('step', '?')}, {p.get('ops', '?')} operations done, "
                f"{p.get('doing', '?')}, heard {now - peer.heard:.1f} s ago"
            )
        if len(shown) < len(self.peers):
            lines.append(f"and {len(self.peers) - len(shown)} others, which are as far or further")
        return "; ".join(lines)

    def _behind(self, rank: int) -> tuple[bool, int, int, int]:
        """Sorts peers: first those that have stopped, then by how far they are."""
        peer = self.peers[rank]
        is_heard = time.monotonic() - peer.heard <= SILENT_SECONDS
        return is_heard, peer.progress.get("step", -1), peer.progress.get("ops", -1), rank

    # Sending, from any thread. A connection takes what it can; the rest waits in its outbox.

    def _say_last(self, message: dict) -> None:
        """Send a message that must arrive, and wait until it has left."""
        self._send(encode_line(message), keep=True)
        deadline = time.monotonic() + FLUSH_SECONDS
        while any(link.outbox for link in self._links.values()) and time.monotonic() < deadline:
            time.sleep(_FLUSH_POLL_SECONDS)
            self._send()

    def _send(self, line: bytes = b"", *, keep: bool = False) -> None:
        """Send every peer its waiting lines, then `line`."""
        with self._lock:
            for link in self._links.values():
                if line:
                    link.outbox.put(line, keep=keep)
                try:
                    link.outbox.send(link.connection)
                except (OSError, ValueError):  # it has ended, which its last words, yet to be read, explain
                    link.outbox.clear()

    # Hearing, on the channel's own thread.

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # noqa: BLE001  (the conductor says so: a rank that hears nothing is broken)
            self.error = error

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, link in self._links.items():
                selector.register(link.connection, selectors.EVENT_READ, rank)
            beat = 0.0
            while not self._closing:
                if time.monotonic() >= beat:
                    self._beat()
                    beat = time.monotonic() + HEARTBEAT_SECONDS
                for key, _ in selector.select(HEARTBEAT_SECONDS / 5):
                    if not self._listen(key.data):
                        selector.unregister(key.fileobj)

    def _beat(self) -> None:
        try:
            self.tell_progress()
        except Exception as error:  # noqa: BLE001  (what cannot be told must not end the telling)
            self._send(encode_line({"doing": f"unknown ({type(error).__name__})"}))
        try:
            self._tick()
        except Exception as error:  # noqa: BLE001  (the peers go on hearing from this rank)
            self.error = error

    def _listen(self, rank: int) -> bool:
        """Read what a peer has sent; False once its connection has ended."""
        link, peer = self._links[rank], self.peers[rank]
        try:
            data = link.connection.recv(MAX_LINE)
        except (BlockingIOError, InterruptedError):
            return True
        except (OSError, ValueError):
            data = b""
        for line in link.reader.feed(data):
            self._hear(peer, line)
        if not data:
            peer.lost_at = min(peer.lost_at, time.monotonic())
            peer.gone = True
        return bool(data)

    def _hear(self, peer: Peer, line: bytes) -> None:
        peer.heard = time.monotonic()
        message = decode_line(line) or {}
        failure, culprit, reason, news = (message.get(key) for key in ("failure", "culprit", "reason", "news"))
        if isinstance(failure, str):
            peer.culprit = culprit if type(culprit) is int and culprit in self.peers else None
            peer.lost_at = min(peer.lost_at, peer.heard)
            peer.failure = failure
        elif message.get("left") is True:
            peer.reason = reason if isinstance(reason, str) else ""
            peer.left = True
        elif isinstance(news, dict):
            peer.news |= {name: value for name, value in news.items() if isinstance(value, (str, int, float))}
        elif message:
            before = peer.progress.get("rounds")
            peer.progress = {key: message[key] for key, kind in _PROGRESS.items() if isinstance(message.get(key), kind)}
            if peer.progress.get("rounds") != before:
                self._on_rounds()
