"""Ways to form cohorts, by hand: the fixed modes' and mode auto's."""

import numpy as np
import pytest

from pipemoe.plan.auto.candidates import CANDIDATES, FIXED_MODES, candidate_name, fixed_assignment
from pipemoe.plan.config import MODES, PlanConfig
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, Microbatch
from pipemoe.plan.verify import verify
from tests.plan.cases import SHAPE


def test_each_candidate_has_a_name_of_its_own():
    names = [candidate_name(index) for index in range(len(CANDIDATES))]
    assert len(set(names)) == len(names) and names[0] == "one cohort"


def test_the_capped_fixed_modes_that_paid_are_candidates():
    rows = set(map(tuple, CANDIDATES.tolist()))
    assert {mode for mode, row in FIXED_MODES.items() if row in rows} == {"two_batch", "pipelined"}


def test_a_cohort_holds_short_ranks_first_and_halves_begin_with_the_larger_part():
    facts = Facts(((5, 4), (), (1,), (3,)))
    first, second = fixed_assignment(facts, PlanConfig(mode="two_batch"))
    assert first == [Microbatch(2, 0, 1), Microbatch(3, 0, 2), Microbatch(0, 0, 5)]
    assert second == [Microbatch(3, 2, 3), Microbatch(0, 5, 9)]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "auto"])
def test_no_tokens_are_no_cohorts(mode):
    assert fixed_assignment(Facts(((), ())), PlanConfig(mode=mode)) == []


@pytest.mark.parametrize("mode", ["pipelined", "auto"])
def test_ranks_may_be_similar_by_any_factor(mode):
    """Products with the ratio fit int64; one past all token counts puts every rank into one cohort."""
    facts = Facts(((8000,), (1,)))
    with np.errstate(all="raise"):
        verify(plan(facts, SHAPE, PlanConfig(mode=mode, pipelined_ratio=2**31 - 1)))
        assert len(fixed_assignment(facts, PlanConfig(mode="pipelined", pipelined_ratio=2**31 - 1))) == 1
        assert len(fixed_assignment(facts, PlanConfig(mode="pipelined", pipelined_ratio=7999))) == 2


@pytest.mark.parametrize("mode", MODES)
def test_whole_sequences_are_never_cut(mode):
    """Microbatches begin and end where sequences do, and every token is in one."""
    config = PlanConfig(mode=mode, whole_sequences=True, moe_max_num_tokens=4096)
    for lengths in (
        ((9000, 40), (30,)),
        ((7000,), ()),
        ((500, 500, 20), (4000,)),
        ((1,), (1,)),
        ((5000,) * 3, (5000,)),
    ):
        facts = Facts(lengths)
        found = plan(facts, SHAPE, config)
        verify(found)
        for cohort in found.cohorts:
            for m in cohort.microbatches:
                assert {m.start, m.stop} <= set(facts.boundaries[m.rank])


def test_two_batch_of_whole_sequences_has_two_cohorts():
    found = fixed_assignment(Facts(((9, 5), (7,))), PlanConfig(mode="two_batch", whole_sequences=True))
    assert found == [[Microbatch(1, 0, 7), Microbatch(0, 9, 14)], [Microbatch(0, 0, 9)]]
    assert len(fixed_assignment(Facts(((9,), ())), PlanConfig(mode="two_batch", whole_sequences=True))) == 1
