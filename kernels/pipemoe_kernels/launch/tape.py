"""A tape: calls of C functions written down as numbers, for a compiled loop that makes them without Python.

    row     | kind | address | a0 | a1 | ... | a7 |

    kind    n >= 0    call the C function at `address` with n arguments of 64 bits
            WORD      write a0 into the 64-bit word at `address`
            NUMBER    write number a0 of those that the loop is given into it

So a tape says all about a launch but a few numbers, such as counts of rows, and serves for any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipemoe_kernels.launch import driver
from pipemoe_kernels.launch.packed_launch import Recorded, recorded

MAX_ARGUMENTS = 8
ROW = 2 + MAX_ARGUMENTS
WORD, NUMBER = -1, -2
_STREAM_OFFSET = driver.LaunchConfig.stream.offset
_POISON = 0x5EED_0DD5_7A7E_0BAD  # what no argument holds


class NotRecordable(Exception):
    """A piece of work cannot be written down; it stays with Python."""


class Tape:
    """Rows in one array. Those written `for_this_run` lie in front, and are forgotten by `begin_run`.

    keeps: what the rows' addresses point into, for as long as they may be played.
    """

    def __init__(self, run_rows: int = 1 << 14, rows: int = 1 << 13) -> None:
        self.rows = np.zeros((run_rows + rows, ROW), np.int64)
        self._run_rows, self._run_length, self._length = run_rows, 0, run_rows
        self.for_this_run = False
        self.keeps: list[Any] = []
        self._kept_for_run: list[Any] = []
        self.names: dict[int, str] = {}  # of functions, by address

    def begin_run(self) -> None:
        self._run_length = 0
        self._kept_for_run.clear()

    def here(self) -> int:
        """The row that is written next."""
        return self._run_length if self.for_this_run else self._length

    def keep(self, what: Any) -> None:
        (self._kept_for_run if self.for_this_run else self.keeps).append(what)

    def _write(self, *row: int) -> None:
        at = self.here()
        if self.for_this_run:
            if at == self._run_rows:
                raise NotRecordable("a run's rows are too many")
            self._run_length += 1
        else:
            if at == len(self.rows):
                self.rows = np.concatenate((self.rows, np.zeros_like(self.rows)))
            self._length += 1
        self.rows[at, : len(row)] = row

    def call(self, function: tuple[str, int], *arguments: int) -> None:
        """function: name and address."""
        name, address = function
        self.names[address] = name
        self._write(len(arguments), address, *arguments)

    def word(self, address: int, value: int) -> None:
        self._write(WORD, address, value)

    def number(self, address: int, index: int) -> None:
        self._write(NUMBER, address, index)

    def launch(self, made: Recorded, moving: dict[int, int], num_blocks: int | None = None) -> None:
        """A kernel's launch. moving: which number goes into which argument. num_blocks: the number with the grid, as
        `grid` packs it; None: as recorded.
        """
        launch = made.launch
        config, arguments = launch.addresses()
        self.keep(launch)
        if num_blocks is None:
            self.word(config, grid(made))
        else:
            self.number(config, num_blocks)
        self.word(config + _STREAM_OFFSET, made.stream)
        for index, number in moving.items():
            self.number(launch.address_of_value(index), number)
        function = getattr(launch.function, "value", launch.function)
        self.call(driver.function("cuLaunchKernelEx"), config, function, arguments, 0)


def grid(made: Recorded) -> int:
    """A launch's grid as the two words of its config."""
    return made.num_blocks | made.num_blocks_y << 32


def moved(work: Callable[[], None]) -> list[tuple[Recorded, dict[int, int]]]:
    """The launches that `work` makes, none of which is made, and of each the arguments that `work` writes anew, by
    index.
    """
    with recorded() as first:
        work()
    before = [list(made.launch.values) for made in first]
    for made in first:
        made.launch.values[:] = [_POISON] * len(made.launch.values)
    try:
        with recorded() as again:
            work()
        found = []
        for made in again:
            values = list(made.launch.values)
            found.append((made, {i: v for i, v in enumerate(values) if v != _POISON}))
    finally:
        for made, values in zip(first, before, strict=True):
            made.launch.values[:] = values
    is_same = [(a.launch, *a[1:]) for a in first] == [(b.launch, *b[1:]) for b in again]
    if not is_same:  # made anew at each call: what it writes cannot be told from what stays
        raise NotRecordable("launches that are not kept")
    return found
