"""Ranks that are threads of this process, with memory of their own kind: what they share is the same to the code."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

PATIENCE = 60  # seconds for what should take milliseconds: only a fault takes so long


def memories(num_ranks: int, num_bytes: int) -> list[np.ndarray]:
    """Zeros for each rank, each at a cache line."""
    found = []
    for _ in range(num_ranks):
        memory = np.zeros(num_bytes + 64, np.uint8)
        start = -memory.ctypes.data % 64
        found.append(memory[start : start + num_bytes])
    return found


def on_ranks(num_ranks: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` returns on each rank; raises what the first of them raised."""
    found: list[Any] = [None] * num_ranks
    errors: list[BaseException | None] = [None] * num_ranks

    def run(rank: int) -> None:
        try:
            found[rank] = work(rank)
        except BaseException as error:  # noqa: BLE001
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a rank waits for ever"
    for error in errors:
        if error is not None:
            raise error
    return found


class Meeting:
    """Exchanges of texts between threads."""

    def __init__(self, num_ranks: int) -> None:
        self._texts: list[str] = [""] * num_ranks
        self._barrier = threading.Barrier(num_ranks, timeout=PATIENCE)

    def exchange_of(self, rank: int) -> Callable[[str], Sequence[str]]:
        def exchange(text: str) -> list[str]:
            self._texts[rank] = text
            self._barrier.wait()
            found = list(self._texts)
            self._barrier.wait()
            return found

        return exchange
