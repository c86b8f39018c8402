"""The planner: sound plans for any counts, and what each mode promises."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.errors import ConfigError, InputError
from pipemoe.plan.auto.candidates import fixed_assignment
from pipemoe.plan.clock.sms import possible_sms_left
from pipemoe.plan.config import MODES, UNCAPPED_MODES, PlanConfig
from pipemoe.plan.cost.model import CostModel, SmsCost
from pipemoe.plan.cost.tuned import MOST_SMS_LEFT
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, Microbatch, ModelShape, OpKind
from pipemoe.plan.verify import verify
from tests.plan.cases import SHAPE, all_facts, assignments, configs


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_mode_verifies(data):
    facts = data.draw(all_facts())
    verify(plan(facts, SHAPE, data.draw(configs(facts, most_waves=20))))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_assignment_verifies(data):
    facts = data.draw(all_facts(max_ranks=6))
    config = data.draw(configs(facts, modes=("pipelined", "per_rank"), most_waves=20))
    verify(plan(facts, SHAPE, config, assignment=data.draw(assignments(facts))))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_planning_is_deterministic(data):
    facts = data.draw(all_facts())
    config = data.draw(configs(facts))
    again = Facts(tuple(tuple(lengths) for lengths in facts.lengths))
    assert plan(facts, SHAPE, config).digest == plan(again, SHAPE, config).digest


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_waves_stay_below_the_cap_and_are_even(data):
    facts = data.draw(all_facts())
    config = data.draw(configs(facts, modes=tuple(m for m in MODES if m not in UNCAPPED_MODES)))
    for cohort in plan(facts, SHAPE, config).cohorts:
        rows = [w.num_rows for w in cohort.waves]
        assert max(rows) <= config.moe_max_num_tokens
        assert len(rows) == -(-sum(rows) // config.moe_max_num_tokens)
        # the last one has what is left
        assert all(n == max(rows) for n in rows[:-1]) and rows[-1] > max(rows) - len(rows)


@pytest.mark.parametrize("cap", [1, 7, 16])
@pytest.mark.parametrize("whole", [1, 2, 5])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_as_many_waves_as_the_cap_needs(cap, whole, more):
    """At exact multiples of the cap as many as that, full ones; one row more needs one more wave."""
    rows = whole * cap + more
    if not rows:
        return
    first = rows // 3
    for mode, lengths in (("chunked", ((first,) if first else (), (rows - first,))), ("per_rank", ((), (rows,)))):
        (cohort,) = plan(Facts(lengths), SHAPE, PlanConfig(mode=mode, moe_max_num_tokens=cap)).cohorts
        sizes = [wave.num_rows for wave in cohort.waves]
        assert len(sizes) == (whole + 1 if more == 1 else whole if more == 0 or cap > 1 else whole - 1)
        assert sum(sizes) == rows and max(sizes) <= cap and (more or sizes == [cap] * whole)


@pytest.mark.parametrize(
    ("rows", "cap", "sizes"),
    [(10, 4, [4, 4, 2]), (9, 4, [3, 3, 3]), (11, 5, [4, 4, 3]), (4, 4, [4]), (5, 4, [3, 2])],
)
def test_waves_are_as_even_as_whole_rows_allow(rows, cap, sizes):
    (cohort,) = plan(Facts(((rows,),)), SHAPE, PlanConfig(mode="chunked", moe_max_num_tokens=cap)).cohorts
    assert [wave.num_rows for wave in cohort.waves] == sizes


def test_digest_tells_plans_apart():
    config = PlanConfig(mode="per_rank")
    digests = {
        plan(facts, shape, c).digest
        for facts in (Facts(((5,), (7,))), Facts(((5,), (3, 4))), Facts(((7,), (5,))))
        for shape in (SHAPE, ModelShape(64, 32, 8, 2, 4))
        for c in (config, PlanConfig(mode="broadcast"), PlanConfig(mode="per_rank", moe_max_num_tokens=4))
    }
    assert len(digests) == 18


def test_no_tokens_anywhere_is_an_empty_plan():
    for mode in MODES:
        p = plan(Facts(((), ())), SHAPE, PlanConfig(mode=mode))
        verify(p)
        assert len(p) == 0


def cohort_ranks(mode, tokens, **options):
    facts = Facts(tuple((n,) if n else () for n in tokens))
    return [sorted(m.rank for m in cohort) for cohort in fixed_assignment(facts, PlanConfig(mode=mode, **options))]


def test_modes_assign_cohorts():
    assert cohort_ranks("broadcast", [9, 0, 3]) == [[0, 2]]
    assert cohort_ranks("two_batch", [9, 1, 3]) == [[0, 1, 2], [0, 2]]
    assert cohort_ranks("per_rank", [9, 0, 3]) == [[2], [0]]
    assert cohort_ranks("pipelined", [4096, 16, 16, 16]) == [[1, 2, 3], [0]]
    assert cohort_ranks("pipelined", [2048] * 4) == [[0, 1, 2, 3]]
    assert cohort_ranks("pipelined", [1, 10, 100, 1000], num_slots=2) == [[0], [1, 2, 3]]


def test_short_ranks_fill_the_first_waves_and_a_ranks_chunks_stay_in_order():
    (cohort,) = plan(Facts(((30,), (5,), (), (7,))), SHAPE, PlanConfig(mode="chunked", moe_max_num_tokens=14)).cohorts
    segments = [[s[:3] for s in wave.segments] for wave in cohort.waves]
    assert segments == [[(1, 0, 5), (3, 0, 7), (0, 0, 2)], [(0, 2, 16)], [(0, 16, 30)]]
    chunks = [[Microbatch(0, 3, 9), Microbatch(1, 0, 4), Microbatch(0, 0, 3)]]
    (cohort,) = plan(Facts(((9,), (4,))), SHAPE, PlanConfig(mode="per_rank"), assignment=chunks).cohorts
    assert cohort.microbatches == (Microbatch(1, 0, 4), Microbatch(0, 0, 3), Microbatch(0, 3, 9))


def test_cohorts_take_the_slots_in_turn():
    for num_slots in (1, 3, 5):
        cohorts = plan(Facts(((1,), (2,), (3,), (4,))), SHAPE, PlanConfig(mode="per_rank", num_slots=num_slots)).cohorts
        assert [cohort.slot for cohort in cohorts] == [c % num_slots for c in range(4)]


def test_short_cohort_is_ordered_ahead_of_a_long_one():
    p = plan(Facts(((4096,), (16,), (16,), (16,))), SHAPE, PlanConfig(mode="pipelined"))
    finished = [op.cohort for op in p.ops if op.kind is OpKind.FINISH]
    assert finished == [0, 1] and sorted(m.rank for m in p.cohorts[0].microbatches) == [1, 2, 3]


def test_padded_wave_holds_the_longest_rank_times_the_ranks():
    p = plan(Facts(((5,), (2, 1), ())), SHAPE, PlanConfig(mode="padded"))
    (wave,) = p.cohorts[0].waves
    assert wave.num_rows == 15 and {(s.rank, s.row) for s in wave.segments} == {(0, 0), (1, 5)}


def test_auto_gathers_what_needs_no_padding():
    def exchanges(mode, tokens):
        p = plan(Facts(tuple((n,) if n else () for n in tokens)), SHAPE, PlanConfig(mode=mode))
        return {p.exchange(wave) for cohort in p.cohorts for wave in cohort.waves}

    assert exchanges("auto", (7, 7, 7)) == {"padded"} and exchanges("auto", (7, 6, 7)) == {"broadcast"}
    assert exchanges("auto", (7, 7, 0)) == {"broadcast"} and exchanges("auto", (7,)) == {"broadcast"}
    assert exchanges("broadcast", (7, 7, 7)) == {"broadcast"} and exchanges("padded", (7, 6, 7)) == {"padded"}


def test_too_many_tokens_names_the_rank():
    with pytest.raises(InputError, match="rank 1: 9 tokens .* max_tokens_per_rank=8"):
        plan(Facts(((8,), (9,))), SHAPE, PlanConfig(max_tokens_per_rank=8))


def test_a_later_chunk_in_an_earlier_cohort_is_refused():
    with pytest.raises(ConfigError, match="cohort 0 continues a sequence of cohort 1"):
        plan(Facts(((8,),)), SHAPE, PlanConfig(), assignment=[[Microbatch(0, 4, 8)], [Microbatch(0, 0, 4)]])


@pytest.mark.parametrize("field", ["moe_max_num_tokens", "max_tokens_per_rank", "num_slots"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_impossible_counts_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        PlanConfig(**{field: value})


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="mode is 'fast'"):
        PlanConfig(mode="fast")
    with pytest.raises(ConfigError, match="combine is 'sum'"):
        PlanConfig(combine="sum")


@pytest.mark.parametrize("tokens", [(16, 0), (900, 900)])
def test_one_cohort_leaves_room_for_the_collectives_of_other_slots(tokens):
    """Of a step alone, one wave leaves none: all wait for all."""
    facts = Facts(tuple((count,) if count else () for count in tokens))
    config, cost = PlanConfig(num_slots=4, moe_max_num_tokens=500), CostModel(sms=SmsCost(ctas=2))
    cohort = [Microbatch(rank, 0, count) for rank, count in enumerate(tokens) if count]
    one_wave = sum(tokens) <= 500
    made = [plan(facts, SHAPE, config, cost, [cohort], first_slot=1, slots_in_use=n) for n in (0, 1, 2, 4)]
    rooms = [min(2 * slots * cost.sms.ctas, cost.sms.num_sms // MOST_SMS_LEFT) for slots in (1, 2, 4)]
    alone = 0 if one_wave else rooms[0]
    assert [m.sms_left for m in made] == [alone, alone, *rooms[1:]] and len(set(rooms)) == 3
    assert all(m.cohorts[0].slot == 1 for m in made)
    assert {m.sms_left for m in made} <= set(possible_sms_left(config, cost.sms))
