"""Rows of a fixed area, handed out in one piece to each sequence: first fit."""

from __future__ import annotations

from bisect import bisect_left


class KeptPlaces:
    """Which of the rows [first, first + num_rows) are free."""

    def __init__(self, first: int, num_rows: int) -> None:
        self._free = [(first, first + num_rows)] if num_rows else []  # sorted; no two touch
        self.num_rows = self.num_free = num_rows

    def take(self, length: int) -> int | None:
        """The first of `length` rows in one piece, which are now taken; None if there is no such piece."""
        for i, (start, stop) in enumerate(self._free):
            if stop - start >= length:
                self._free[i : i + 1] = [(start + length, stop)] if stop - start > length else []
                self.num_free -= length
                return start
        return None

    def give_back(self, start: int, length: int) -> None:
        """Free rows that `take` has handed out."""
        stop, i = start + length, bisect_left(self._free, (start, start))
        self.num_free += length
        if i < len(self._free) and self._free[i][0] == stop:
            stop = self._free.pop(i)[1]
        if i and self._free[i - 1][1] == start:
            i -= 1
            start = self._free.pop(i)[0]
        self._free.insert(i, (start, stop))
