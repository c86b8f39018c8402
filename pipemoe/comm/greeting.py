"""How the ranks meet for the side channel: each connects to every lower rank, and both ends prove that they know the
job's token.

    lower rank                                 higher rank
    listens                                    connects
    _HELLO: magic, nonce            ------>
                                    <------    _ANSWER: magic, rank, nonce, proof of "higher"
    proof of "lower"                ------>

A proof is an HMAC of the token over the role, both ranks and both nonces. So the token does not travel, and a proof
that somebody overhears cannot be replayed, reflected, or used between other ranks. Messages have fixed lengths, and
nothing is parsed.

Nothing blocks, and one clock limits it all: slow strangers hold up nobody but themselves, however many they are.
"""

from __future__ import annotations

import errno
import hmac
import os
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipemoe.comm.lines import MAX_LINE, decode_line, encode_line
from pipemoe.errors import PeerLost

GREETING_SECONDS = 5.0  # for the whole greeting on one connection; a rank that is late connects again
# Connections that have not yet proved who they are, beside one for each rank. One more, and the oldest is closed.
MOST_GUESTS = 64
_REFUSED_SECONDS = 5.0  # how long to try again where nobody of this job listens
_SILENT_SECONDS = 30.0  # for an answer from a host: its kernel gives it, however busy the rank is
_PAUSE_SECONDS = 0.2  # between attempts
_POLL_SECONDS = 0.05
_FULL_SECONDS = 0.01
_MAGIC, _NONCE_BYTES = b"pipemoe2", 32
_HELLO = struct.Struct(f"<8s{_NONCE_BYTES}s")
_ANSWER = struct.Struct(f"<8sq{_NONCE_BYTES}s32s")
_PROOF_BYTES = 32


def proof(token: str, role: str, lower: int, higher: int, nonces: bytes) -> bytes:
    """Proof that the rank in `role` ("lower" or "higher") knows the token."""
    message = struct.pack("<8s8sqq", _MAGIC, role.encode(), lower, higher) + nonces
    return hmac.digest(token.encode(), message, "sha256")


def meet(
    rank: int, listener: socket.socket, addresses: Sequence[tuple[str, int]], token: str, seconds: float
) -> dict[int, socket.socket]:
    """Connect to every lower rank and accept every higher one: a non-blocking connection for each.

    addresses: of all ranks. token: the same on all ranks. seconds: for all of it. Raises PeerLost, which says which
    rank is not there, at which address, and what to do.
    """
    meeting = _Meeting(rank, listener, addresses, token, seconds)
    try:
        return meeting.run()
    except BaseException as error:
        for connection in meeting.met.values():
            if isinstance(error, PeerLost):
                _say(connection, encode_line({"failure": str(error), "culprit": error.culprit}))
            connection.close()
        raise
    finally:
        meeting.close()


@dataclass
class _Greeting:
    """A connection whose greeting is under way."""

    connection: socket.socket
    nonce: bytes  # this end's
    since: float
    data: bytes = b""
    peer_nonce: bytes | None = None  # of a call: the hello has come

    def receive(self, size: int) -> bytes | None:
        """The next `size` bytes, or None until all have come. Raises OSError if the other end has closed."""
        more = self.connection.recv(size - len(self.data))
        if not more:
            raise ConnectionResetError(errno.ECONNRESET, "it closed the connection")
        self.data += more
        if len(self.data) < size:
            return None
        data, self.data = self.data, b""
        return data


@dataclass
class _Call:
    """A lower rank that this one connects to."""

    peer: int
    greeting: _Greeting | None = None
    is_connected: bool = False
    next_try: float = 0.0
    refused_since: float | None = None
    why: str = "no answer"


class _Meeting:
    def __init__(
        self, rank: int, listener: socket.socket, addresses: Sequence[tuple[str, int]], token: str, seconds: float
    ) -> None:
        self._rank, self._listener, self._addresses, self._token, self._seconds = (
            rank,
            listener,
            addresses,
            token,
            seconds,
        )
        self.met: dict[int, socket.socket] = {}
        self._calls = [_Call(peer) for peer in range(rank)]
        self._guests: dict[socket.socket, _Greeting] = {}  # in the order in which they came
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._on(listener, selectors.EVENT_READ, self._accept)

    def run(self) -> dict[int, socket.socket]:
        deadline = time.monotonic() + self._seconds
        while len(self.met) < len(self._addresses) - 1:
            now = time.monotonic()
            if now > deadline:
                raise self._missing()
            for call in self._calls:
                if call.peer not in self.met:
                    self._move(call, now)
            while self._guests and now - next(iter(self._guests.values())).since > GREETING_SECONDS:
                self._show_out(next(iter(self._guests)))
            for key, _ in self._selector.select(_POLL_SECONDS):
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj.fileno() >= 0:  # closed meanwhile
                    key.data()
        return self.met

    def close(self) -> None:
        for guest in list(self._guests):
            self._show_out(guest)
        for call in self._calls:
            self._hang_up(call)
        self._selector.close()

    def _on(self, connection: socket.socket, event: int, work: Callable[[], None]) -> None:
        self._selector.register(connection, event, work)

    def _take(self, peer: int, connection: socket.socket) -> None:
        """`connection` is that of rank `peer`. Until all have met, hear whether it ends."""
        self._selector.unregister(connection)
        self.met[peer] = connection
        self._on(connection, selectors.EVENT_READ, lambda: self._look(peer, connection))

    def _look(self, peer: int, connection: socket.socket) -> None:
        try:
            data = connection.recv(MAX_LINE, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            raise self._error(peer, "ended while the ranks were meeting; its own output says why")
        last_words = decode_line(data.split(b"\n")[0]) or {}
        if "failure" in last_words:
            culprit = last_words.get("culprit")
            raise self._error(
                culprit if type(culprit) is int else peer, f"is lost, as rank {peer} says: {last_words['failure']}"
            )
        self._selector.unregister(connection)  # it has met all, and goes on

    # Of the lower rank: who comes in.

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # who was there has gone, or there is no descriptor left for it
            if self._guests:
                self._show_out(next(iter(self._guests)))
            else:
                time.sleep(_FULL_SECONDS)
            return
        if len(self._guests) >= MOST_GUESTS + len(self._addresses):
            self._show_out(next(iter(self._guests)))
        connection.setblocking(False)
        guest = self._guests[connection] = _Greeting(connection, secrets.token_bytes(_NONCE_BYTES), time.monotonic())
        self._on(connection, selectors.EVENT_READ, lambda: self._hear_guest(guest))
        if not _say(connection, _HELLO.pack(_MAGIC, guest.nonce)):
            self._show_out(connection)

    def _hear_guest(self, guest: _Greeting) -> None:
        try:
            data = guest.receive(_ANSWER.size)
        except BlockingIOError:
            return
        except OSError:
            self._show_out(guest.connection)
            return
        if data is None:
            return
        magic, peer, nonce, found = _ANSWER.unpack(data)
        wanted = proof(self._token, "higher", self._rank, peer, guest.nonce + nonce)
        is_peer = magic == _MAGIC and self._rank < peer < len(self._addresses) and peer not in self.met
        if not (hmac.compare_digest(found, wanted) and is_peer):
            self._show_out(guest.connection)
        elif not _say(guest.connection, proof(self._token, "lower", self._rank, peer, guest.nonce + nonce)):
            self._show_out(guest.connection)
        else:
            del self._guests[guest.connection]
            self._take(peer, guest.connection)

    def _show_out(self, connection: socket.socket) -> None:
        del self._guests[connection]
        self._selector.unregister(connection)
        connection.close()

    # Of the higher rank: whom it calls.

    def _move(self, call: _Call, now: float) -> None:
        if call.greeting is None:
            if now >= call.next_try:
                self._dial(call, now)
        elif not call.is_connected and now - call.greeting.since > _SILENT_SECONDS:
            raise self._unreachable(call, f"no answer for {now - call.greeting.since:.0f} s")

    def _dial(self, call: _Call, now: float) -> None:
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        connection.setblocking(False)
        call.greeting, call.is_connected = _Greeting(connection, secrets.token_bytes(_NONCE_BYTES), now), False
        self._on(connection, selectors.EVENT_WRITE, lambda: self._connected(call))
        try:
            status = connection.connect_ex(self._addresses[call.peer])
        except OSError as error:  # no such address
            status = error.errno or errno.EADDRNOTAVAIL
        if status not in (0, errno.EINPROGRESS):
            self._refused(call, os.strerror(status))

    def _connected(self, call: _Call) -> None:
        assert call.greeting is not None  # _dial has made it
        connection = call.greeting.connection
        status = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if status:
            self._refused(call, os.strerror(status))
        elif connection.getsockname() == connection.getpeername():  # where nobody listens, TCP may meet itself
            self._refused(call, os.strerror(errno.ECONNREFUSED))
        else:
            call.is_connected = True
            self._selector.modify(connection, selectors.EVENT_READ, lambda: self._hear_host(call))

    def _hear_host(self, call: _Call) -> None:
        greeting = call.greeting
        assert greeting is not None  # _dial has made it
        try:
            data = greeting.receive(_HELLO.size if greeting.peer_nonce is None else _PROOF_BYTES)
        except BlockingIOError:
            return
        except OSError as error:  # it took this rank for a late guest, or it has ended
            call.why = f"connected, but then: {error.strerror}"
            self._hang_up(call)
            return
        if data is None:
            return
        if greeting.peer_nonce is None:
            magic, greeting.peer_nonce = _HELLO.unpack(data)
            mine = proof(self._token, "higher", call.peer, self._rank, greeting.peer_nonce + greeting.nonce)
            if magic != _MAGIC or not _say(greeting.connection, _ANSWER.pack(_MAGIC, self._rank, greeting.nonce, mine)):
                self._refused(call, "what answers there is no rank of this job")
            return
        if hmac.compare_digest(
            data, proof(self._token, "lower", call.peer, self._rank, greeting.peer_nonce + greeting.nonce)
        ):
            call.greeting = None
            self._take(call.peer, greeting.connection)
        else:
            self._refused(call, "what answers there is no rank of this job")

    def _hang_up(self, call: _Call) -> None:
        """Give an attempt up; the next one comes after a pause."""
        if call.greeting is not None:
            self._selector.unregister(call.greeting.connection)
            call.greeting.connection.close()
        call.greeting, call.next_try = None, time.monotonic() + _PAUSE_SECONDS

    def _refused(self, call: _Call, why: str) -> None:
        """Nobody of this job listens there. Listeners exist before their addresses are told: waiting hardly helps."""
        self._hang_up(call)
        now = time.monotonic()
        call.why, call.refused_since = why, call.refused_since or now
        if now - call.refused_since > _REFUSED_SECONDS:
            raise self._unreachable(call, why)

    # What to say.

    def _unreachable(self, call: _Call, why: str) -> PeerLost:
        host, port = self._addresses[call.peer]
        return self._error(
            call.peer,
            f"cannot be reached at {host} port {port} ({why}); the ranks' hosts must let one another connect to any "
            "TCP port:"
            " see to the firewall, or set PIPEMOE_INTERFACE on every host to the network interface that reaches the "
            "others",
        )

    def _missing(self) -> PeerLost:
        calls = [call for call in self._calls if call.peer not in self.met]
        if calls:
            return self._unreachable(calls[0], f"{calls[0].why}, within setup_seconds={self._seconds:g}")
        absent = [peer for peer in range(self._rank + 1, len(self._addresses)) if peer not in self.met]
        host, port = self._addresses[self._rank]
        return self._error(
            absent[0],
            f"has not connected to {host} port {port} within setup_seconds={self._seconds:g} ({len(absent)} of "
            f"{len(self._addresses)} ranks"
            " have not); its own output may say why: see to the firewall, or set PIPEMOE_INTERFACE",
        )

    def _error(self, peer: int, text: str) -> PeerLost:
        return PeerLost(f"rank {self._rank}: rank {peer} {text}", culprit=peer)


def _say(connection: socket.socket, data: bytes) -> bool:
    """Send a few bytes at once. A new connection has room for them, so anything less means that it is broken."""
    try:
        return connection.send(data) == len(data)
    except OSError:
        return False
