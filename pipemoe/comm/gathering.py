"""One small all-gather of bytes: every rank gives some, every rank gets all. It does not block; poll `done()`.

Collectives match by call order, so each message carries its purpose. Ranks whose purposes differ all raise the same
error.
"""

from __future__ import annotations

import struct
from typing import Any, Protocol

from pipemoe.comm.exchange import shared
from pipemoe.errors import MismatchError

BLOCK = 512  # bytes that travel in the first collective; longer messages need a second one
_LENGTH = struct.Struct("<q")
_ROOM = BLOCK - _LENGTH.size
_DOING_LENGTH = struct.Struct("<H")
_LONGEST_DOING = 1000  # characters


class Gathering(Protocol):
    def done(self) -> bool:
        """Poll; True once `payloads` holds every rank's bytes. Raises MismatchError, on every rank, if they are for
        different things.
        """

    payloads: list[bytes]


class LocalGathering:
    """The gathering of a world of one."""

    def __init__(self, payload: bytes) -> None:
        self.payloads = [payload]

    def done(self) -> bool:
        return True


class MpiGathering:
    """Iallgather of a fixed block per rank, followed by an Iallgatherv only if some message did not fit in it."""

    def __init__(self, comm: Any, payload: bytes, doing: str) -> None:
        self._comm = comm
        self._message = pack_message(payload, doing)
        self._blocks = bytearray(BLOCK * comm.Get_size())
        block = (_LENGTH.pack(len(self._message)) + self._message[:_ROOM]).ljust(BLOCK, b"\0")
        self._mine: Any = block  # kept alive until the request is done
        self._request = comm.Iallgather(block, self._blocks)
        self._sizes: list[int] | None = None
        self._rest = bytearray()
        self.payloads: list[bytes] = []

    def done(self) -> bool:
        if self._request is not None and self._request.Test():
            self._request = None
            self._advance()
        return self._request is None

    def _advance(self) -> None:
        size = self._comm.Get_size()
        if self._sizes is None:
            self._sizes = [_LENGTH.unpack_from(self._blocks, BLOCK * r)[0] for r in range(size)]
            overflow = [max(0, n - _ROOM) for n in self._sizes]
            if any(overflow):
                from mpi4py import MPI

                self._rest = bytearray(sum(overflow))
                self._mine = self._message[_ROOM:]
                self._request = self._comm.Iallgatherv([self._mine, MPI.BYTE], [self._rest, overflow, MPI.BYTE])
                return
        messages, at = [], 0
        for rank, n in enumerate(self._sizes):
            begin = BLOCK * rank + _LENGTH.size
            rest = max(0, n - _ROOM)
            messages.append(bytes(self._blocks[begin : begin + n - rest]) + bytes(self._rest[at : at + rest]))
            at += rest
        self.payloads = unpack_messages(messages)


def pack_message(payload: bytes, doing: str) -> bytes:
    """One rank's message: its purpose, then `payload`."""
    text = doing[:_LONGEST_DOING].encode(errors="backslashreplace")
    return _DOING_LENGTH.pack(len(text)) + text + payload


def unpack_messages(messages: list[bytes]) -> list[bytes]:
    """All ranks' payloads. Raises MismatchError, naming each rank's purpose, unless all are the same."""
    payloads: list[bytes] = []
    ranks_doing: dict[str, list[int]] = {}
    for rank, message in enumerate(messages):
        begin = _DOING_LENGTH.size + _DOING_LENGTH.unpack_from(message)[0]
        ranks_doing.setdefault(message[_DOING_LENGTH.size : begin].decode(), []).append(rank)
        payloads.append(message[begin:])
    if len(ranks_doing) > 1:
        found = "; ".join(f"{doing!r} on rank {', '.join(map(str, ranks))}" for doing, ranks in ranks_doing.items())
        raise shared(MismatchError(f"every rank must call the same, in the same order, but here they meet: {found}"))
    return payloads
