"""How an engine's arguments become rounds."""

import pytest

from pipemoe.errors import ConfigError
from pipemoe.plan.cost.model import CoresCost, CostModel
from pipemoe.plan.schedule import ModelShape
from pipemoe.rolling.admission import POLICIES
from pipemoe.rolling.engine_settings import engine_settings
from pipemoe.rolling.round_time import RoundTime

OF_FOUR = {"max_tokens_per_rank": 4096, "num_ranks": 4, "cuts": True}


def test_rounds_take_a_step_of_each_rank():
    for policy in POLICIES:
        found = engine_settings(policy, 512, **OF_FOUR)
        assert (found.max_tokens_per_round, found.max_round_rows, found.fixed_rows) == (512, 2048, 0)
        assert found.num_slots(4) == (4 if policy == "rolling" else 1)
    assert engine_settings("lockstep", None, **OF_FOUR).chunk_tokens == 2048


def test_the_cost_model_sizes_rolling_rounds_unless_a_step_is_given():
    times = RoundTime(ModelShape(2048, 768, 128, 8, 48), CostModel(), 4, 8192)
    found = engine_settings("rolling", None, times=times, **OF_FOUR)
    assert (found.max_tokens_per_round, found.chunk_tokens) == (4096, 4096)
    assert (found.fixed_rows, found.pairs_per_row) == (times.fixed_rows(), times.pairs_per_row())
    assert not found.shares_cores and found.beside_rows == times.beside_rows() > 0
    on_cores = RoundTime(ModelShape(2048, 768, 128, 8, 48), CostModel(cores=CoresCost(2000)), 4, 8192)
    assert engine_settings("rolling", None, times=on_cores, **OF_FOUR).shares_cores
    for policy, tokens in (("rolling", 512), ("lockstep", None), ("lockstep", 512)):
        found = engine_settings(policy, tokens, times=times, **OF_FOUR)
        assert found._replace(most_slots=0) == engine_settings(policy, tokens, **OF_FOUR)


@pytest.mark.parametrize(
    ("cores", "wanted"), [(0, 2), (1, 1), (2, 1), (7, 1), (8, 2), (12, 3), (64, 3)], ids=lambda n: str(n)
)
def test_slots_that_would_share_cores_do_not_roll_unless_asked_for(cores, wanted):
    times = RoundTime(ModelShape(2048, 768, 128, 8, 48), CostModel(cores=CoresCost(1000 * cores)), 4, 8192)
    for tokens in (None, 512):
        assert engine_settings("rolling", tokens, times=times, **OF_FOUR).num_slots(3) == wanted
        assert engine_settings("rolling", tokens, num_slots=2, times=times, **OF_FOUR).num_slots(3) == 2
    assert engine_settings("lockstep", None, num_slots=2, times=times, **OF_FOUR).num_slots(3) == 1
    assert engine_settings("rolling", None, **OF_FOUR).num_slots(3) == 3


def test_what_cannot_be_cut_goes_whole():
    assert engine_settings("rolling", 512, **OF_FOUR | {"cuts": False}).max_tokens_per_round == 4096


@pytest.mark.parametrize(
    ("policy", "step_tokens", "wrong"),
    [
        ("eager", None, "policy is 'eager'; it must be one of rolling"),
        ("lockstep", 0, "step_tokens"),
        ("lockstep", 4097, "step_tokens is 4097, more than max_tokens_per_rank=4096"),
    ],
)
def test_bad_arguments(policy, step_tokens, wrong):
    with pytest.raises(ConfigError, match=wrong):
        engine_settings(policy, step_tokens, **OF_FOUR)


@pytest.mark.parametrize("num_slots", [0, -1, 1.5, "2", True])
def test_a_bad_number_of_slots(num_slots):
    with pytest.raises(ConfigError, match="num_slots"):
        engine_settings("rolling", None, num_slots=num_slots, **OF_FOUR)
