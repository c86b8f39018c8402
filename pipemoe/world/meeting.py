"""The ranks' first meeting: each tells all others where it is, and each knows who is missing.

A collective call could not name the missing ranks, so every rank sends every other one a small message.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pipemoe.errors import WatchdogTimeout
from pipemoe.runtime.last_words import say

MOST_BYTES = 1024  # of a message
_TAG = 28113  # of COMM_WORLD, which is the caller's; every MPI has tags up to 32,767
_FIRST_WORD_SECONDS, _NEXT_WORD_SECONDS = 5.0, 10.0
_PAUSE = 0.001


class Meeting:
    """Posted when made; `missing` polls. payload: at most MOST_BYTES."""

    def __init__(self, comm: Any, payload: bytes) -> None:
        from mpi4py import MPI

        self._mpi, self.rank = MPI, comm.Get_rank()
        peers = [r for r in range(comm.Get_size()) if r != self.rank]
        self._heard = {r: bytearray(MOST_BYTES) for r in peers}
        self._receives = {r: comm.Irecv([memory, MPI.BYTE], source=r, tag=_TAG) for r, memory in self._heard.items()}
        self._sends = [comm.Isend([payload, MPI.BYTE], dest=r, tag=_TAG) for r in peers]
        self.payloads: dict[int, bytes] = {self.rank: payload}

    def missing(self) -> list[int]:
        """Ranks that have not come. Empty once `payloads` holds every rank's message."""
        status = self._mpi.Status()
        for rank in list(self._receives):
            if self._receives[rank].Test(status):
                del self._receives[rank]
                self.payloads[rank] = bytes(self._heard.pop(rank)[: status.Get_count(self._mpi.BYTE)])
        if self._receives or self._mpi.Request.Testall(self._sends):
            return sorted(self._receives)
        return [
            r
            for r, request in zip((r for r in sorted(self.payloads) if r != self.rank), self._sends)
            if not request.Test()
        ]


class Patience:
    """Limits a wait for ranks that may not come, and reports it every few seconds."""

    def __init__(self, who: str, seconds: float) -> None:
        self._who, self._seconds, self._begin, self._next_word = who, seconds, time.monotonic(), _FIRST_WORD_SECONDS

    def look(self, waits_for: str) -> None:
        """Call it now and then. Raises WatchdogTimeout once the time is over."""
        waited = time.monotonic() - self._begin
        if waited > self._seconds:
            raise WatchdogTimeout(
                f"{self._who}: waited {waited:.1f} s for {waits_for}; is there a rank that does not call "
                "pipemoe.init()?"
            )
        if waited > self._next_word:
            self._next_word = waited + _NEXT_WORD_SECONDS
            say(f"pipemoe: {self._who}: has waited {waited:.0f} of at most {self._seconds:.0f} s for {waits_for}")


def wait_for(done: Callable[[], str], patience: Patience) -> None:
    """Poll `done` until it returns an empty text. Any other text says what is still missing."""
    while waits_for := done():
        patience.look(waits_for)
        time.sleep(_PAUSE)


def ranks_text(ranks: list[int]) -> str:
    """Ranks in words; of many, the first."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
