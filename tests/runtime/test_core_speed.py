"""How fast cores are: what the clock's figures become."""

import pytest

from pipemoe.plan.cost.tuned import REFERENCE_LOOP_NS, REFERENCE_PRODUCT_NS
from pipemoe.runtime import core_speed


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
