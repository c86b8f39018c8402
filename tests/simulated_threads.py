"""A pytest plugin for Numba's CUDA simulator: a block's threads take turns, each as far as its next barrier.

The simulator itself lets all of them run at once and polls them meanwhile; most of its time goes to threads that get in
one another's way. Behind every barrier the order is another one, from a fixed seed: without a barrier that it needs, a
kernel reads what has not been written yet, in every run the same.
"""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
from numba.cuda.simulator import kernel


class Turns:
    """Whose turn it is, of a block's threads."""

    def __init__(self, seed: object) -> None:
        self.failed: Thread | None = None
        self._random = random.Random(str(seed))
        self._left: list[Thread] = []  # those whose turn comes before the next barrier opens
        self._waiting: list[Thread] = []  # at that barrier
        self._over = threading.Semaphore(0)

    def run(self, threads: list[Thread]) -> None:
        """Returns when all threads have ended."""
        for thread in threads:
            thread.start()
        self._waiting = threads
        self.pass_on()
        self._over.acquire()

    def wait(self, thread: Thread) -> None:
        """This thread is at a barrier."""
        self._waiting.append(thread)
        self.pass_on()
        thread.turn.acquire()
        if self.failed is not None:
            raise RuntimeError("another thread of the block has failed")

    def end(self, thread: Thread) -> None:
        if thread.exception is not None and self.failed is None:
            self.failed = thread
        self.pass_on()

    def pass_on(self) -> None:
        if not self._left:
            self._left, self._waiting = self._waiting, []
            self._random.shuffle(self._left)
        if self._left:
            self._left.pop().turn.release()
        else:
            self._over.release()


class Thread(kernel.BlockThread):
    def __init__(self, turns: Turns, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.turns, self.turn = turns, threading.Semaphore(0)

    def run(self) -> None:
        self.turn.acquire()
        if self.turns.failed is None:
            super().run()
        self.turns.end(self)

    def syncthreads(self) -> None:
        self.turns.wait(self)


def run_block(manager: kernel.BlockManager, grid_point: tuple[int, ...], *arguments: Any) -> None:
    turns = Turns(grid_point)
    places = np.ndindex(*manager._block_dim)
    work = lambda: manager._f(*arguments)  # noqa: E731
    turns.run([Thread(turns, work, manager, grid_point, place, manager._debug) for place in places])
    if turns.failed is not None:
        error, trace = turns.failed.exception
        raise error.with_traceback(trace)


kernel.BlockManager.run = run_block
