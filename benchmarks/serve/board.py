"""A few numbers that all ranks of a host see while an Engine is open: a file that they share.

While ranks roll, nobody may call them together. So the ranks of a benchmark meet here, learn here to which rank a
request goes, and leave what happened to it. Each field of the file is written by one rank; all others only read it.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipemoe.errors import InputError
from pipemoe.traffic.arrival_times import Arrival
from pipemoe.traffic.served import Served

if TYPE_CHECKING:
    from pipemoe import World

_POLL_S = 5e-3  # others may still be served on the same cores
_NOBODY = -1
_UNKNOWN = np.nan  # of times


class Board:
    """Of one rank. Fields are arrays [num_ranks] or [most_requests]."""

    def __init__(self, path: Path, rank: int, num_ranks: int, most_requests: int, *, create: bool = False) -> None:
        """path: the file, the same on all ranks. One rank creates it before the others open it."""
        self.rank, self.num_ranks = rank, num_ranks
        fields = [
            ("met", np.int64, num_ranks),  # how often each rank has come to `meet`
            ("done_tokens", np.int64, num_ranks),  # of each rank's requests that have their first token, or failed
            ("done", np.int64, num_ranks),  # how many
            ("begin", np.float64, 1),  # of time.perf_counter, which all processes of a host share; by rank 0
            ("rank_of", np.int64, most_requests),  # by rank 0, as requests arrive
            ("admitted", np.float64, most_requests),  # these by the rank that has the request
            ("first_token", np.float64, most_requests),
        ]
        size = sum(np.dtype(kind).itemsize * count for _, kind, count in fields)
        memory = np.memmap(path, np.uint8, "w+" if create else "r+", shape=(size,))
        self._fields: dict[str, np.ndarray] = {}
        at = 0
        for name, kind, count in fields:
            stop = at + np.dtype(kind).itemsize * count
            self._fields[name] = memory[at:stop].view(kind)
            at = stop
        self.most_requests = most_requests

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self.__dict__["_fields"][name]
        except KeyError:
            raise AttributeError(name) from None

    def meet(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Wait until all ranks have come here as often as this one."""
        self.met[self.rank] += 1
        while (self.met < self.met[self.rank]).any():
            sleep(_POLL_S)

    def clear(self, begin: float) -> None:
        """Before requests are served: nothing is known of them. All ranks meet before and behind it. begin: the time
        from which others count, as rank 0 says.
        """
        self.meet()
        self.done_tokens[self.rank] = self.done[self.rank] = 0
        if self.rank == 0:
            self.rank_of[:] = _NOBODY
            self.admitted[:] = self.first_token[:] = _UNKNOWN
            self.begin[0] = begin
        self.meet()

    def assigned(self, number: int) -> int | None:
        """The rank that a request goes to, once rank 0 has said so."""
        rank = int(self.rank_of[number])
        return None if rank == _NOBODY else rank

    def served(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """What happened to the requests. Those that nobody was to have are said to be rank 0's."""
        found = []
        for number, seconds, tokens in arrivals:
            times = (float(self.admitted[number]), float(self.first_token[number]))
            known = [None if np.isnan(t) else t for t in times]
            found.append(Served(number, max(0, int(self.rank_of[number])), tokens, seconds, *known))
        return found


def shared_board(world: World, most_requests: int) -> Board:
    """Every rank's board. Every rank calls, before an Engine is open. Raises InputError, on every rank, where ranks are
    on several hosts.
    """
    path = Path("/")
    board, error = None, None
    if world.rank == 0:
        number, name = tempfile.mkstemp(prefix="pipemoe_board_")
        os.close(number)
        path = Path(name)
        board = Board(path, 0, world.size, most_requests, create=True)
    path = Path(world.all_gather(str(path).encode(), "the board's file")[0].decode())
    try:
        board = board or Board(path, world.rank, world.size, most_requests)
    except OSError as found:
        error = InputError(
            f"rank {world.rank}: cannot open {path.name}, a file of rank 0: {found.strerror}; all ranks must run on "
            "one host"
        )
    world.agree(error, {}, "opening the board")
    if world.rank == 0:
        path.unlink()
    assert board is not None  # or `agree` has raised
    return board
