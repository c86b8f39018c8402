"""One small all-gather of bytes: every rank gives some, every rank gets all. Non-blocking; whoever waits polls `done()`."""

from __future__ import annotations

import struct
from typing import Any, Protocol

BLOCK = 512  # bytes that travel in the first collective; longer payloads need a second one
_LENGTH = struct.Struct("<q")
_ROOM = BLOCK - _LENGTH.size


class Gathering(Protocol):
    def done(self) -> bool:
        """Poll; True once `payloads` holds every rank's bytes."""

    payloads: list[bytes]


class LocalGathering:
    """The gathering of a world of one."""

    def __init__(self, payload: bytes) -> None:
        self.payloads = [payload]

    def done(self) -> bool:
        return True


class MpiGathering:
    """Iallgather of a fixed block per rank, followed by an Iallgatherv only if some payload did not fit in it."""

    def __init__(self, comm: Any, payload: bytes) -> None:
        self._comm = comm
        self._payload = payload
        self._blocks = bytearray(BLOCK * comm.Get_size())
        block = (_LENGTH.pack(len(payload)) + payload[:_ROOM]).ljust(BLOCK, b"\0")
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
                self._mine = self._payload[_ROOM:]
                self._request = self._comm.Iallgatherv([self._mine, MPI.BYTE], [self._rest, overflow, MPI.BYTE])
                return
        at = 0
        for rank, n in enumerate(self._sizes):
            begin = BLOCK * rank + _LENGTH.size
            overflow = max(0, n - _ROOM)
            self.payloads.append(bytes(self._blocks[begin : begin + n - overflow]) + bytes(self._rest[at : at + overflow]))
            at += overflow
