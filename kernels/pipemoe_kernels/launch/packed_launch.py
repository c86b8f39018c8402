"""A kernel's launch, laid out once as the driver reads it; each use rewrites only what has moved.

    values      | address | stride | ... |          8 bytes an argument; a 32-bit parameter reads the low half
    addresses   | &values[0] | &values[1] | ...     what the driver takes
    config      grid, threads, shared memory, stream, attributes

The driver copies all of it before a launch returns, also into a graph that is being captured. So a launch may be used
again at once, but by one thread at a time. Its owner is something that two calls must not use at once anyway, such as a
scratch.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from pipemoe_kernels.launch import driver


class PackedLaunch:
    """Call it to enqueue. values: the arguments, to be rewritten in place (Kernel.index_of finds a parameter's)."""

    __slots__ = ("_addresses", "_arguments", "_call", "_config", "function", "values")

    def __init__(self, function: ctypes.c_void_p, config: driver.LaunchConfig, values: Sequence[int]):
        count = len(values)
        self.function = function
        self.values = (ctypes.c_int64 * count)(*values)
        base = ctypes.addressof(self.values)
        self._addresses = (ctypes.c_void_p * count)(*range(base, base + 8 * count, 8))
        self._config = config
        self._arguments = (ctypes.byref(config), function, self._addresses, None)
        self._call = driver.launch_call()

    def __call__(self, stream: int, num_blocks: int, num_blocks_y: int = 1) -> None:
        """Enqueue on the stream with this handle, in a grid of num_blocks x num_blocks_y blocks."""
        if _recording.launches is not None:
            _recording.launches.append(Recorded(self, stream, num_blocks, num_blocks_y))
            return
        config = self._config
        config.grid_x, config.grid_y, config.stream = num_blocks, num_blocks_y, stream
        if result := self._call(*self._arguments):
            driver.check(result, "cuLaunchKernelEx")

    def address_of_value(self, index: int) -> int:
        """Where an argument lies."""
        return ctypes.addressof(self.values) + 8 * index

    def addresses(self) -> tuple[int, int]:
        """Of the config, and of the arguments' addresses: what the driver takes."""
        return ctypes.addressof(self._config), ctypes.addressof(self._addresses)


class Recorded(NamedTuple):
    """A launch that was written down instead of made."""

    launch: PackedLaunch
    stream: int
    num_blocks: int
    num_blocks_y: int


class _Recording(threading.local):
    launches: list[Recorded] | None = None


_recording = _Recording()


@contextmanager
def recorded() -> Iterator[list[Recorded]]:
    """Launches of this thread are not made but listed, in order."""
    assert _recording.launches is None
    _recording.launches = []
    try:
        yield _recording.launches
    finally:
        _recording.launches = None
