"""How an engine's arguments become rounds."""

import pytest

from pipemoe.errors import ConfigError
from pipemoe.rolling.admission import POLICIES
from pipemoe.rolling.engine_settings import engine_settings

OF_FOUR = {"max_tokens_per_rank": 4096, "num_ranks": 4, "cuts": True}


def test_rounds_take_a_step_of_each_rank_and_short_slots_a_step_of_all():
    rolling = engine_settings("rolling", None, **OF_FOUR)
    assert (rolling.max_tokens_per_round, rolling.max_round_rows, rolling.short_round_rows) == (2048, 8192, 2048)
    for policy in POLICIES[1:]:
        found = engine_settings(policy, 512, **OF_FOUR)
        assert (found.max_tokens_per_round, found.max_round_rows, found.short_round_rows) == (512, 2048, None)
        assert found.num_slots(4) == 1


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
