"""Policies by name, and the rank that a request goes to."""

import pytest

from pipemoe.errors import InputError
from pipemoe.traffic.policy import Policy, policies_of, rank_for


def test_lockstep_comes_once_for_each_step_size():
    found = policies_of(["rolling", "lockstep", "lockstep_balanced"], [64, 128], "round_robin")
    assert found == [
        Policy("rolling"),
        Policy("lockstep", 64),
        Policy("lockstep", 128),
        Policy("lockstep_balanced", 64, "least_tokens"),
        Policy("lockstep_balanced", 128, "least_tokens"),
    ]
    assert [p.label for p in found][::2] == ["rolling", "lockstep 128", "lockstep_balanced 128"]
    assert policies_of(["rolling"], [], "least_tokens")[0].label == "rolling least tokens"


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="'eager': must be one of rolling"):
        policies_of(["eager"], [1], "round_robin")
    with pytest.raises(InputError, match="give each once"):
        policies_of(["lockstep"], [64, 64], "round_robin")


def test_routes():
    assert [rank_for("round_robin", n, [9, 0, 0]) for n in range(4)] == [0, 1, 2, 0]
    assert rank_for("least_tokens", 0, [5, 2, 2]) == 1
