"""On the host, what stands for experts that take waves as they arrive: a call waits in its thread for the parts of the
rows.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque

import torch

from tests.runtime.hold import HOLD_SECONDS


class Arrivals:
    """Waves of one receive buffer: expected, and not yet called for, in order."""

    num_bytes = 1000

    def __init__(self):
        self.waves = deque()


class _Wave:
    def __init__(self, layer, rows, part_rows):
        self.layer, self.rows, self.bounds = layer, rows, [0, *itertools.accumulate(part_rows)]
        self.seen: dict[int, torch.Tensor] = {}  # a part's bytes when it was announced
        self.complete = threading.Event()


class WaitingExperts:
    """Calls of `inner`, which compute when all rows are there, and take them to be what they were when announced.

    began: called by each call before it waits, with the layer and the parts that are there.
    """

    def __init__(self, inner, began=lambda layer, parts: None):
        self._inner, self._began = inner, began
        self.warmed_up = 0

    def new_arrivals(self, max_rows):
        return Arrivals()

    def warm_up(self, arrivals, scratch, column_blocks):
        self.warmed_up += 1

    def expect(self, arrivals, layer, rows, part_rows):
        assert sum(part_rows) == len(rows) and min(part_rows) > 0
        arrivals.waves.append(_Wave(layer, rows, part_rows))

    def arrived(self, arrivals, part):
        wave = arrivals.waves[0]  # the next one has the buffer when this one has been called for
        assert part not in wave.seen
        wave.seen[part] = wave.rows.buffer[wave.bounds[part] : wave.bounds[part + 1]].clone()
        if len(wave.seen) == len(wave.bounds) - 1:
            wave.complete.set()

    def __call__(self, arrivals, out, scratch, events=()):
        wave = arrivals.waves[0]
        self._began(wave.layer, sorted(wave.seen))
        assert wave.complete.wait(HOLD_SECONDS)
        arrivals.waves.popleft()
        assert torch.equal(wave.rows.buffer, torch.cat([wave.seen[part] for part in sorted(wave.seen)]))
        self._inner(wave.layer, wave.rows, out, scratch, events)
