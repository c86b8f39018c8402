"""How fast cores are: what the clock's figures become."""

import pytest
import torch

from pipemoe.plan.cost.tuned import (
    FIXED_ON_CPU,
    FIXED_ON_GPU,
    FIXED_ON_LONE_GPU,
    REFERENCE_LOOP_NS,
    REFERENCE_PRODUCT_NS,
)
from pipemoe.runtime import core_speed
from tests.moe_cases import make_layers
from tests.runtime.sources import RowsSource, make_runtime


@pytest.mark.parametrize(("product", "loop", "wanted"), [(1, 1, 1000), (2, 2, 2000), (3, 1, 2200), (1, 3, 1800)])
def test_products_and_python_count(product, loop, wanted, monkeypatch):
    """Times the references."""
    now, turns = [0], []

    def thread_time_ns():
        takes = (0, 10 * product * REFERENCE_PRODUCT_NS, loop * REFERENCE_LOOP_NS)[len(turns) % 3]
        turns.append(takes)
        now[0] += takes
        return now[0]

    monkeypatch.setattr(core_speed.time, "thread_time_ns", thread_time_ns)
    assert core_speed.slowness.__wrapped__() == wanted


def test_one_slow_round_does_not_count(monkeypatch):
    now, turns = [0], []

    def thread_time_ns():
        number, part = divmod(len(turns), 3)
        takes = (0, 10 * REFERENCE_PRODUCT_NS, REFERENCE_LOOP_NS)[part] * (50 if number == 3 else 1)
        turns.append(takes)
        now[0] += takes
        return now[0]

    monkeypatch.setattr(core_speed.time, "thread_time_ns", thread_time_ns)
    assert core_speed.slowness.__wrapped__() == 1000


def test_it_is_measured_once():
    assert core_speed.slowness() == core_speed.slowness() > 0


@pytest.mark.mpi
def test_all_ranks_plan_by_one_speed_of_cores(world, monkeypatch):
    """That of the median rank; if they are two, the faster."""
    monkeypatch.setattr("pipemoe.runtime.costs.slowness", lambda: 1000 * (1 + world.rank))
    runtime = make_runtime(world, make_layers(1, world.device, torch.float32), mode="broadcast")
    if world.device.type == "cuda":  # costs of GPUs do not depend on the cores
        assert runtime.cost.finish_ns == (FIXED_ON_GPU if world.size > 1 else FIXED_ON_LONE_GPU)["finish_ns"]
        return
    assert runtime.cost.finish_ns == FIXED_ON_CPU["finish_ns"] * (1 + (world.size - 1) // 2)
    runtime.submit_step([3], RowsSource(3, runtime)).result()  # ranks whose costs differ would not get so far
