"""A runtime's first step may take as long as set-up: a caller's own code may compile in it. On every rank, and on the
conductor's thread too.
"""

import time

import pytest
import torch

from tests.moe_cases import make_layers
from tests.runtime.sources import RowsSource, make_runtime

pytestmark = pytest.mark.mpi
SHORT_SECONDS = 0.2
COMPILING_SECONDS = 2.0  # longer than the watch over a call allows, which is a second more than that


class CompilingSource(RowsSource):
    """Its rank holds up the others, and its own conductor's thread."""

    def ready(self, cohort, layer):
        if layer == 1 and not self.has_compiled:
            time.sleep(COMPILING_SECONDS)
            self.has_compiled = True
        return True

    has_compiled = False


def test_the_first_step_of_a_runtime_may_take_longer_than_the_watchdog_allows(world, monkeypatch):
    runtime = make_runtime(world, make_layers(3, world.device, torch.float32))
    source = CompilingSource(3, runtime) if world.rank == world.size - 1 else RowsSource(3, runtime)
    monkeypatch.setattr(world.conductor, "watchdog_seconds", SHORT_SECONDS)
    runtime.submit_step([3], source).result()
    world.all_gather(b"")
    assert world.conductor.step_seconds == 0.0
    monkeypatch.undo()
    waits = []
    monkeypatch.setattr(
        world.conductor, "wait", lambda *a, wait=world.conductor.wait, **k: (waits.append(k["seconds"]), wait(*a, **k))
    )
    runtime.submit_step([3], RowsSource(3, runtime)).result()
    world.all_gather(b"")
    assert waits[:2] == [world.conductor.watchdog_seconds] * 2  # the second has no more than that
