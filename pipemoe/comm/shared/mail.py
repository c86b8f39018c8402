"""Small all-gathers over shared memory: each rank posts a message in its own memory, and reads the others' there.

A message travels in blocks, all ranks' block n at the same time. A rank's block n lies in its buffer n % 2. It may be
written when the rank has read block n - 1 of all ranks: they posted that only after they had read block n - 2.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from pipemoe.comm.gathering import pack_message, unpack_messages
from pipemoe.comm.shared import words
from pipemoe.comm.shared.flags import num_missing

BLOCK = 1 << 14  # bytes
_FLAG = 64  # bytes: the number of the last block posted, in a line of its own
_LENGTH = struct.Struct("<q")  # of the message, before its first block's part


class Mail:
    """One rank's mail. Only for one thread; all ranks start the same gatherings in the same order."""

    def __init__(
        self,
        rank: int,
        memories: Sequence[np.ndarray],
        ring_all: Callable[[], None],
        wants: Callable[[int], None] = lambda num_ranks: None,
    ) -> None:
        """memories: [num_bytes()] uint8 of each rank. ring_all: wakes up the others. wants: told for how many ranks
        this one waits.
        """
        self._rank, self._memories, self._ring_all, self._wants = rank, list(memories), ring_all, wants
        self._flags = np.array([memory.ctypes.data for memory in memories], np.int64)
        self._posted = 0  # blocks
        self._under_way: deque[SharedGathering] = deque()

    @staticmethod
    def num_bytes() -> int:
        """Of a rank's mail."""
        return _FLAG + 2 * BLOCK

    def start(self, payload: bytes, doing: str) -> SharedGathering:
        """Begin a gathering; see World.start_gathering."""
        gathering = SharedGathering(self, pack_message(payload, doing))
        self._under_way.append(gathering)
        if len(self._under_way) == 1:
            self._post(gathering.next_block())
        return gathering

    def num_ahead(self) -> int:
        """How many more blocks than this rank some peer has posted."""
        return max(words.load(int(flag)) for flag in self._flags) - self._posted

    def move(self) -> None:
        """Go on with what is under way, as far as it goes."""
        while self._under_way:
            missing = num_missing(self._flags, self._posted)
            if missing:
                self._wants(missing)
                return
            gathering = self._under_way[0]
            if gathering.take([self._block(memory, self._posted) for memory in self._memories]):
                self._under_way.popleft()
            if self._under_way:
                self._post(self._under_way[0].next_block())

    def _block(self, memory: np.ndarray, number: int) -> memoryview:
        start = _FLAG + number % 2 * BLOCK
        return memory[start : start + BLOCK].data

    def _post(self, block: bytes) -> None:
        self._posted += 1
        self._block(self._memories[self._rank], self._posted)[: len(block)] = block
        words.store(int(self._flags[self._rank]), self._posted)
        self._ring_all()


class SharedGathering:
    """One gathering; see comm.gathering.Gathering."""

    def __init__(self, mail: Mail, message: bytes) -> None:
        self._mail, self._message, self._at = mail, _LENGTH.pack(len(message)) + message, 0
        self._found: list[bytearray] = []
        self._lengths: list[int] = []
        self._is_complete = False
        self.payloads: list[bytes] = []

    def next_block(self) -> bytes:
        """This rank's part of the next block; empty if its message was shorter than others'."""
        self._at += BLOCK
        return self._message[self._at - BLOCK : self._at]

    def take(self, blocks: Sequence[memoryview]) -> bool:
        """Read all ranks' block; True if their messages are complete."""
        if not self._found:
            self._found = [bytearray() for _ in blocks]
            self._lengths = [_LENGTH.size + _LENGTH.unpack_from(block)[0] for block in blocks]
        for found, length, block in zip(self._found, self._lengths, blocks, strict=True):
            found += block[: length - len(found)]
        self._is_complete = all(map(int.__eq__, map(len, self._found), self._lengths))
        return self._is_complete

    def done(self) -> bool:
        self._mail.move()
        if self._is_complete and not self.payloads:
            self.payloads = unpack_messages([bytes(found[_LENGTH.size :]) for found in self._found])
        return self._is_complete
