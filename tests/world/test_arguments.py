"""Arguments of init that cannot be: a ConfigError that names argument and value, at once."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import pipemoe
from pipemoe.errors import ConfigError
from pipemoe.world import world as world_module
from pipemoe.world.arguments import MOST_SLOTS, init_arguments

GOOD = {"device": "cpu", "num_slots": 4, "watchdog_seconds": 60.0, "setup_seconds": 600, "grace_seconds": 0}


class Odd:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


ODD = (
    None,
    True,
    "1",
    float("nan"),
    float("inf"),
    -1,
    -0.5,
    1e300,
    1j,
    [1],
    (),
    {},
    b"1",
    np.array([1, 2]),
    np.array(["cpu", "cpu"]),
    Odd(),
)


@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", GOOD)
def test_odd_values_are_refused(name, value, monkeypatch):
    monkeypatch.setattr(world_module, "_open_world", None)
    if name == "num_slots" and value is None:
        pytest.skip("stands for the default")
    with pytest.raises(ConfigError, match=f"^{name} is "):
        pipemoe.init(**{**GOOD, name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_slots", 0),
        ("num_slots", 2000),
        ("num_slots", 2.0),
        ("watchdog_seconds", 0),
        ("setup_seconds", 0.0),
        ("device", "gpu"),
        ("device", "cuda:0"),
    ],
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"^{name} is .*must be"):
        init_arguments(**{**GOOD, name: value})


def test_numbers_of_any_kind_are_taken():
    arguments = init_arguments("auto", np.int64(3), np.float32(1.5), Fraction(1, 2), 0)
    assert (arguments.num_slots, arguments.watchdog_seconds, arguments.setup_seconds, arguments.grace_seconds) == (
        3,
        1.5,
        0.5,
        0.0,
    )
    assert [type(v) for v in (arguments.num_slots, arguments.watchdog_seconds)] == [int, float]


@pytest.mark.parametrize("text", ["", "four", "0", "-1", "2.0", str(MOST_SLOTS + 1), "9" * 5000, "²"])
def test_slots_of_the_environment(text, monkeypatch):
    monkeypatch.setenv("PIPEMOE_NUM_SLOTS", text)
    with pytest.raises(ConfigError, match="^PIPEMOE_NUM_SLOTS is "):
        init_arguments(**{**GOOD, "num_slots": None})
    monkeypatch.setenv("PIPEMOE_NUM_SLOTS", "7")
    assert init_arguments(**{**GOOD, "num_slots": None}).num_slots == 7
