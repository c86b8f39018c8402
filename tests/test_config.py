"""What a Config refuses, and what it takes."""

from pathlib import Path

import pytest

from pipemoe import Config
from pipemoe.errors import ConfigError
from pipemoe.plan.config import PlanConfig


@pytest.mark.parametrize("num_slots", [None, 2])
@pytest.mark.parametrize(
    ("name", "value"),
    [("deterministic", "yes"), ("deterministic", 1), ("debug", None), ("cost", 7), ("cost", b"cost.json")],
)
def test_values_of_another_kind_are_refused(name, value, num_slots):
    with pytest.raises(ConfigError, match=f"^{name} is {value!r}; it must be "):
        Config(num_slots=num_slots, **{name: value})


def test_a_cost_file_may_be_a_path():
    assert Config(cost=Path("cost.json")).in_world(2).cost == Path("cost.json")


def test_deterministic_sums_are_gathered_whatever_combine_says():
    assert Config(deterministic=True, combine="reduce").combine == "gather"


@pytest.mark.parametrize("kind", [Config, PlanConfig])
@pytest.mark.parametrize(
    "name", ["moe_max_num_tokens", "max_tokens_per_rank", "num_slots", "pipelined_ratio", "num_sms"]
)
def test_counts_have_bounds_wherever_they_are_given(kind, name):
    assert getattr(kind(**{name: 2**31 - 1}), name) == 2**31 - 1
    with pytest.raises(ConfigError, match=f"^{name} is {2**31}; it must be at most {2**31 - 1}"):
        kind(**{name: 2**31})
    with pytest.raises(ConfigError, match=f"^{name} is 0; it must be a whole number of at least 1"):
        kind(**{name: 0})
    with pytest.raises(ConfigError, match=f"^{name} is a int; it must be at most"):
        kind(**{name: 10**5000})  # has no words in Python
