"""A finished step is gone: nothing keeps its source, and so its rows and keys and values, alive."""

import gc
import weakref

import torch

from tests.moe_cases import make_layers
from tests.runtime.sources import RowsSource, make_runtime


def test_a_steps_source_is_freed_without_the_cycle_collector(world):
    runtime = make_runtime(world, make_layers(2, world.device, torch.float32), mode="per_rank")
    runtime.submit_step([5], RowsSource(5, runtime)).result()  # what is kept of a first step only (caches) is there now
    gc.collect()
    gc.disable()
    try:
        source = RowsSource(5, runtime)
        alive = weakref.ref(source)
        runtime.submit_step([5], source).result()
        del source
        world.all_gather(b"")  # the conductor has gone on to another task, and so let go of the step
        world.all_gather(b"")
        assert alive() is None
    finally:
        gc.enable()
