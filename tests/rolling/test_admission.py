"""Admission: the order in which chunks go, budgets, lags, patience, and what no round could take."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.errors import ConfigError, PlanError
from pipemoe.rolling.admission import Admission, RollingSettings
from pipemoe.rolling.offer import MAX_CHUNKS, Chunk, Offer

SETTINGS = RollingSettings(max_tokens_per_round=100, max_round_rows=150, chunk_tokens=50, most_rounds_waited=4)


def whole(sequence: int, length: int, age: int = 0, priority: int = 0) -> Chunk:
    return Chunk(sequence, 0, length, length, age, priority)


def admitted(*ranks: list[Chunk], slot: int = 0, num_slots: int = 2, chosen=SETTINGS, lags=(), **more) -> list:
    """Per rank, the sequences that go."""
    admission = Admission(slot, num_slots, len(ranks), chosen)
    offers = [Offer(tuple(chunks), lags, **more) for chunks in ranks]
    return [[(c.sequence, c.tokens) for c in of_rank] for of_rank in admission.admit(offers)]


def test_all_that_fits_goes():
    assert admitted([whole(0, 40), whole(1, 60)], [whole(0, 50)], []) == [[(0, 40), (1, 60)], [(0, 50)], []]


def test_what_does_not_fit_is_passed_over():
    chunks = [whole(0, 70, priority=1), whole(1, 40), whole(2, 30, priority=-1)]
    assert admitted(chunks) == [[(0, 70), (2, 30)]]


def test_all_ranks_share_the_rows_of_a_round():
    assert admitted([whole(0, 80)], [whole(0, 80)], [whole(0, 60)]) == [[(0, 80)], [], [(0, 60)]]


def test_ranks_take_turns_in_going_first():
    admission = Admission(0, 2, 2, SETTINGS)
    offers = [Offer((whole(0, 100),)), Offer((whole(0, 100),))]
    goes = [[bool(chunks) for chunks in admission.admit(offers)] for _ in range(4)]
    assert sorted(goes[:2]) == sorted(goes[2:]) == [[False, True], [True, False]]


def order(chunks: list[Chunk], **changed) -> list[int]:
    return [s for s, _ in admitted(chunks, slot=1, chosen=SETTINGS._replace(max_tokens_per_round=150, **changed))[0]]


def test_in_lockstep_priority_goes_first_then_what_has_begun_then_age():
    chunks = [whole(0, 30), whole(1, 30, age=3), Chunk(7, 50, 90, 90), whole(2, 50, priority=1)]
    assert order(chunks, policy="lockstep") == [2, 7, 1, 0]


def test_rolling_priority_goes_first_then_the_least_work_per_round_waited():
    chunks = [whole(0, 40), whole(1, 50, age=3), whole(3, 10), Chunk(7, 50, 65, 65), whole(2, 20, priority=1)]
    assert order(chunks) == [2, 3, 1, 7, 0]


def test_attention_counts_as_work():
    late, early = Chunk(0, 90, 110, 110), whole(1, 30)
    assert order([late, early]) == [0, 1]
    assert order([late, early], pairs_per_row=20) == [1, 0]


def test_who_waited_too_long_goes_before_priority():
    assert admitted([whole(0, 80, priority=9), whole(1, 80, age=4, priority=-9)]) == [[(1, 80)]]
    assert admitted([whole(0, 80, age=4), whole(1, 80, age=5)]) == [[(1, 80)]]


def test_only_the_last_slot_cuts():
    chunks = [Chunk(0, 10, 50, 90, priority=1), whole(1, 50), whole(2, 40, priority=-1)]
    assert admitted(chunks, slot=1) == [[(0, 40), (1, 50), (2, 10)]]
    with pytest.raises(PlanError, match="slot 0, which takes whole sequences only"):
        admitted([Chunk(0, 10, 50, 90)])


@pytest.mark.parametrize(
    ("lag", "goes"),
    [(0, [0, 1, 2]), (2000, [0, 1, 2]), (2300, [0, 1]), (2900, [0]), (3000, []), (60000, [])],
)
def test_a_short_slot_takes_less_while_a_long_round_is_late(lag, goes):
    chunks = [whole(n, 30) for n in range(3)]
    chosen = SETTINGS._replace(fixed_rows=150)  # no small round
    assert [s for s, _ in admitted(chunks, lags=(0, lag), chosen=chosen)[0]] == goes
    for found in (admitted(chunks, lags=(0, lag))[0], admitted([whole(0, 1)], lags=(0, lag), chosen=chosen)[0]):
        assert bool(found) == bool(goes)  # until it takes nothing it takes something


def test_the_long_slot_waits_for_no_short_one():
    assert admitted([whole(0, 50)], slot=1, lags=(60000, 60000)) == [[(0, 50)]]


def test_who_waited_too_long_goes_beside_a_long_round_that_stands_still():
    assert admitted([whole(0, 30), whole(1, 30, age=4)], lags=(0, 60000)) == [[(1, 30)]]


def test_a_round_is_a_share_of_what_waits_on_the_rank_with_the_most_work():
    chosen = SETTINGS._replace(fixed_rows=5, max_round_rows=200)
    many = [whole(n, 10) for n in range(10)]
    assert admitted(many[:5], [whole(0, 20)], chosen=chosen) == [[(0, 10), (1, 10)], [(0, 20)]]
    assert [len(of) for of in admitted(many, many[:3], many[:7], chosen=chosen)] == [4, 3, 4]
    offers = [Offer(tuple(many[:7]), waiting_tokens=30)]
    assert len(Admission(0, 2, 1, chosen).admit(offers)[0]) == 4


@pytest.mark.parametrize(
    ("shares_cores", "count", "goes"),
    [(True, 1, 1), (True, 2, 2), (True, 3, 2), (True, 5, 2), (True, 6, 3), (True, 10, 5)]
    + [(False, 2, 1), (False, 3, 1), (False, 5, 2), (False, 10, 4)],
)
def test_in_one_slot_a_round_is_at_least_some_times_what_it_costs_by_itself(shares_cores, count, goes):
    chosen = SETTINGS._replace(fixed_rows=3, max_round_rows=200, cuts=False, shares_cores=shares_cores)
    assert len(admitted([whole(n, 10) for n in range(count)], [], num_slots=1, chosen=chosen)[0]) == goes


def test_beside_other_slots_a_round_is_at_least_two_thirds_of_what_it_costs_by_itself():
    chosen = SETTINGS._replace(fixed_rows=42, max_round_rows=200)
    assert [len(of) for of in admitted([whole(n, 9) for n in range(5)], [], chosen=chosen)] == [3, 0]


def test_a_sequence_is_cut_only_if_another_one_waits():
    chosen = SETTINGS._replace(fixed_rows=1, pairs_per_row=7)
    assert admitted([whole(0, 50)], [], slot=1, chosen=chosen) == [[(0, 50)], []]
    for short, behind in ((whole(1, 9), 0), (whole(1, 9), 40)):
        (found,) = Admission(1, 2, 1, chosen).admit([Offer((whole(0, 50), short), waiting_tokens=behind)])
        assert [(chunk.sequence, chunk.tokens) for chunk in found][0] == (1, 9) and 0 < found[-1].tokens < 50
    late = Offer((whole(0, 50),), lags=(0, 0, 60000))
    assert Admission(1, 3, 1, chosen).admit([late]) == ((),)


@given(
    st.lists(st.lists(st.integers(1, 60), max_size=4), min_size=1, max_size=3).filter(any),
    st.integers(1, 60),
    st.sampled_from([1, 7, 1000]),
)
def test_what_a_round_has_work_for_is_not_cut(ranks, start, pairs_per_row):
    """Not even by the one token that a row's fraction is worth."""
    chosen = RollingSettings(1000, 4000, 1000, fixed_rows=10**6, pairs_per_row=pairs_per_row)
    offered = [tuple(Chunk(n, start, start + t, start + t) for n, t in enumerate(of)) for of in ranks]
    found = Admission(0, 1, len(ranks), chosen).admit([Offer(chunks) for chunks in offered])
    assert [sorted(of) for of in found] == [sorted(of) for of in offered]


def test_what_goes_whole_goes_first_of_its_rank_even_if_it_is_longer_than_a_best_round():
    chosen = SETTINGS._replace(fixed_rows=1)
    assert admitted([whole(0, 90), whole(1, 90)], [whole(0, 10)], chosen=chosen) == [[(0, 90)], [(0, 10)]]


def test_a_chunk_is_cut_to_the_best_round():
    chosen = SETTINGS._replace(fixed_rows=1, pairs_per_row=10)
    waiting = chosen.work(20, 60)
    ((_, tokens), *_), _ = admitted([Chunk(0, 20, 60, 60)], [whole(0, 1)], slot=1, chosen=chosen)
    best = chosen.best_work(waiting, 2)
    assert chosen.work(20, 20 + tokens) <= best + 1 and chosen.work(20, 21 + tokens) >= best


def test_a_best_round_is_a_share_of_what_waits_and_no_small_part_of_its_own_cost():
    chosen = RollingSettings(1000, 4000, 1000, fixed_rows=300)
    assert [chosen.best_work(waiting, 2) for waiting in (0, 500, 1000, 1001)] == [201, 201, 400, 401]
    assert [chosen.best_work(waiting, 1) for waiting in (0, 1500, 10000, 10001)] == [600, 600, 4000, 4001]
    on_cores = chosen._replace(shares_cores=True)
    assert [on_cores.best_work(waiting, 1) for waiting in (0, 4800, 10000, 10001)] == [2400, 2400, 5000, 5001]
    beside_long = chosen._replace(beside_rows=1)
    assert [beside_long.best_work(waiting, 2) for waiting in (0, 2000, 10000, 10001)] == [600, 600, 3000, 3001]
    assert chosen._replace(fixed_rows=1).best_work(0, 2) == 1


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(0, 10**4))
def test_most_tokens_is_the_inverse_of_work(start, work, pairs_per_row):
    chosen = SETTINGS._replace(pairs_per_row=pairs_per_row)
    tokens = chosen.most_tokens(start, work)
    assert chosen.work(start, start + tokens) <= work and chosen.work(start, start + tokens + 1) >= work


def test_patient_ranks_wait_for_those_without_work():
    chosen = SETTINGS._replace(policy="lockstep_delayed")
    chunks = [whole(0, 30)]
    assert admitted(chunks, [], num_slots=1, chosen=chosen, patient=True) == [[], []]
    assert admitted(chunks, chunks, num_slots=1, chosen=chosen, patient=True) == [[(0, 30)], [(0, 30)]]
    assert admitted(chunks, [], num_slots=1, chosen=chosen, patient=False) == [[(0, 30)], []]
    assert admitted([whole(0, 30, age=4)], [], num_slots=1, chosen=chosen, patient=True) == [[(0, 30)], []]
    assert admitted(chunks, [], num_slots=1, patient=True) == [[(0, 30)], []]


def test_nobody_waits_for_a_rank_that_leaves():
    admission = Admission(0, 1, 2, SETTINGS._replace(policy="lockstep_delayed"))
    assert admission.admit([Offer((whole(0, 5),), patient=True), Offer(leaving=True)]) == ((whole(0, 5),), ())


@pytest.mark.parametrize(
    ("offer", "words"),
    [
        (Offer((whole(0, 101),)), "rank 0 offers .*length=101.* at most 100 tokens"),
        (Offer((Chunk(0, 5, 5, 9),)), "rank 0 offers"),
        (Offer((Chunk(0, 0, 9, 8),)), "rank 0 offers"),
        (Offer(tuple(whole(n, 1) for n in range(MAX_CHUNKS + 1))), "21 chunks, more than 20"),
        (Offer((whole(0, 1),), leaving=True), "says that it has none"),
    ],
)
def test_an_offer_that_no_round_could_take_is_an_error(offer, words):
    with pytest.raises(PlanError, match=words):
        Admission(0, 2, 1, SETTINGS).admit([offer])


def test_offers_of_all_ranks_are_needed():
    with pytest.raises(PlanError, match="offers of 1 ranks; there are 2"):
        Admission(0, 2, 2, SETTINGS).admit([Offer()])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"max_tokens_per_round": 0}, "max_tokens_per_round is 0"),
        ({"chunk_tokens": 101}, "chunk_tokens is 101, more than max_tokens_per_round=100"),
        ({"max_round_rows": 99}, "max_tokens_per_round is 100, more than max_round_rows=99"),
        ({"policy": "eager"}, "policy is 'eager'"),
        ({"fixed_rows": -1}, "fixed_rows is -1"),
        ({"beside_rows": -1}, "beside_rows is -1"),
        ({"pairs_per_row": 0.5}, "pairs_per_row is 0.5"),
        ({"most_rounds_waited": 40000}, "at most 32767"),
        ({"most_rounds_waited": 1.5}, "whole number"),
    ],
)
def test_settings_that_cannot_work(changed, words):
    with pytest.raises(ConfigError, match=words):
        Admission(0, 2, 1, SETTINGS._replace(**changed))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**30))
def test_the_bound_on_waiting_holds_when_all_ranks_offer_all_they_may(num_ranks, most, seed):
    """Full offers for ever, of chunks that leave room for one only, always of a higher priority than the last."""
    chosen = RollingSettings(10, 10, 10, most)
    admission = Admission(0, 2, num_ranks, chosen)
    ages = {(rank, n): 0 for rank in range(num_ranks) for n in range(MAX_CHUNKS)}
    for _ in range(3 * chosen.longest_wait(num_ranks)):
        offers = [
            Offer(tuple(whole(n, 10, age, min(127, n // 20)) for (r, n), age in ages.items() if r == rank))
            for rank in range(num_ranks)
        ]
        goes = {(rank, c.sequence) for rank, chunks in enumerate(admission.admit(offers)) for c in chunks}
        ages = {who: age + 1 for who, age in ages.items() if who not in goes}
        for rank, sequence in goes:
            ages[rank, sequence + MAX_CHUNKS] = 0
        assert len(goes) == 1 and max(ages.values()) <= chosen.longest_wait(num_ranks)
