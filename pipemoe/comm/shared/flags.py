"""Flags of ranks: words that each rank raises to the number of a wave, and events that are done when some have come so
far.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numba import types

from pipemoe.comm.shared.words import _load, compiled


@compiled(lambda: types.int64(types.int64[::1], types.int64))
def num_missing(flags, number):
    """How many of the words at the addresses `flags` have not come to `number`. Numbers may pass 2^31."""
    missing = 0
    for flag in flags:
        if np.int32(_load(flag) - number) < 0:
            missing += 1
    return missing


class FlagEvent:
    """Done when all `flags` (addresses of words, int64) have come to `number`."""

    __slots__ = ("_begin", "_end", "_flags", "_number", "_passed", "error", "of_reuse")

    def __init__(self, flags: np.ndarray, number: int, *, of_reuse: bool = False) -> None:
        """of_reuse: the ranks that raise these flags do not expect this rank to wait."""
        self._flags, self._number, self.of_reuse = flags, number, of_reuse
        self._passed = number == 0 or not len(flags)
        self._begin = self._end = time.perf_counter()
        self.error: BaseException | None = None  # as of other events; a flag brings none

    @classmethod
    def passed(cls) -> FlagEvent:
        """One that waits for nothing."""
        return cls(np.empty(0, np.int64), 0)

    def done(self) -> bool:
        if not self._passed and num_missing(self._flags, self._number) == 0:
            self._passed, self._end = True, time.perf_counter()
        return self._passed

    def missing(self) -> int:
        """How many flags it waits for."""
        return 0 if self._passed else num_missing(self._flags, self._number)

    def begin(self) -> None:
        """The wait has begun, for `span`."""
        self._begin = time.perf_counter()

    def span(self) -> tuple[float, float]:
        return min(self._begin, self._end), self._end

    def end(self) -> float:
        return self._end


class JoinedEvent:
    """Done when flags have come and a lane of this rank has passed an event. For who looks now and then."""

    __slots__ = ("_flags", "_event", "error")

    def __init__(self, flags: FlagEvent, event: Any) -> None:
        self._flags, self._event = flags, event
        self.error: BaseException | None = None  # the lane raises its own

    def done(self) -> bool:
        return self._event.done() and self._flags.done()

    def span(self) -> tuple[float, float]:
        (begin, end), (other_begin, other_end) = self._flags.span(), self._event.span()
        return min(begin, other_begin), max(end, other_end)

    def end(self) -> float:
        return self.span()[1]
