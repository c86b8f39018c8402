"""What each rank issues, written out by hand, and ranks whose issues do not fit together."""

from dataclasses import replace

import pytest

from pipemoe.errors import PlanError
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.planner import plan
from pipemoe.plan.projection import Issue, gather_calls, match, project
from pipemoe.plan.schedule import Facts, ModelShape, OpKind, Segment, Wave

SHAPE = ModelShape(hidden=64, intermediate=32, num_experts=8, top_k=2, num_layers=2)
ROW, VALUE = 384, 2  # bytes
FACTS = Facts(((5,), (), (3, 4)))


def planned(mode="broadcast", **options):
    return plan(FACTS, SHAPE, PlanConfig(mode=mode, max_tokens_per_rank=100, **options))


def test_broadcasts_and_reduces_of_every_segment():
    p = planned()
    dispatch = [Issue("dispatch", 0, 0, "broadcast", 0, 5 * ROW), Issue("dispatch", 0, 0, "broadcast", 2, 7 * ROW)]
    combine = [Issue("combine", 0, 0, "reduce", 0, 5 * 64 * VALUE), Issue("combine", 0, 0, "reduce", 2, 7 * 64 * VALUE)]
    for rank in range(3):  # with or without tokens
        assert project(p, rank, ROW, VALUE) == (dispatch + combine) * 2  # layers


def test_one_collective_of_padded_blocks():
    issues = [
        Issue("dispatch", 0, 0, "all_gather", -1, 21 * ROW),
        Issue("combine", 0, 0, "reduce_scatter", -1, 21 * 64 * VALUE),
    ]
    assert all(project(planned("padded"), rank, ROW, VALUE) == issues * 2 for rank in range(3))


def test_a_gather_sends_to_the_owner_and_receives_for_oneself():
    p = planned(combine="gather")

    def combines(rank):
        return [(i.primitive, i.peer, i.num_bytes) for i in project(p, rank, ROW, VALUE) if i.communicator == "combine"]

    short, long = 5 * 64 * VALUE, 7 * 64 * VALUE
    assert combines(0) == [("recv", 1, short), ("recv", 2, short), ("send", 2, long)] * 2
    assert combines(1) == [("send", 0, short), ("send", 2, long)] * 2
    assert combines(2) == [("send", 0, short), ("recv", 0, long), ("recv", 1, long)] * 2


def test_several_segments_of_one_rank_are_called_for_one_after_another():
    a, b, c = Segment(1, 0, 4, 0), Segment(0, 0, 2, 4), Segment(1, 4, 5, 6)
    wave = Wave((a, b, c), 7)
    assert list(gather_calls(wave, 1, 3)) == [
        ("recv", 0, a),
        ("recv", 2, a),
        ("send", 0, b),
        ("recv", 0, c),
        ("recv", 2, c),
    ]
    assert list(gather_calls(wave, 2, 3)) == [("send", 1, a), ("send", 0, b), ("send", 1, c)]


def test_slots_buffers_and_waves():
    """Waves alternate between the buffers of their cohort's slot, over the layers too."""
    p = planned("per_rank", moe_max_num_tokens=3)  # the short rank in two waves, the long one in three
    issues = project(p, 1, ROW, VALUE)
    assert [(i.buffer, i.peer, i.num_bytes // ROW) for i in issues if i[:2] == ("dispatch", 0)] == [
        (0, 0, 3),
        (1, 0, 2),
    ] * 2
    of_long = [(i.buffer, i.peer, i.num_bytes // ROW) for i in issues if i[:2] == ("dispatch", 1)]
    assert of_long == [(0, 2, 3), (1, 2, 3), (0, 2, 1), (1, 2, 3), (0, 2, 3), (1, 2, 1)]
    assert [i.buffer for i in issues if i[:2] == ("combine", 1)] == [0, 1, 0, 1, 0, 1]
    order = [
        (o.kind.name.lower(), p.cohorts[o.cohort].slot) for o in p.ops if o.kind in (OpKind.DISPATCH, OpKind.COMBINE)
    ]
    assert [i[:2] for i in issues] == order


@pytest.fixture(params=["reduce", "gather"])
def issues_of(request):
    p = planned(combine=request.param)
    issues_of = [project(p, rank, ROW, VALUE) for rank in range(3)]
    match(issues_of)
    return issues_of


@pytest.mark.parametrize("changes", [{"peer": 1}, {"num_bytes": 1}, {"primitive": "all_gather"}, {"buffer": 1}])
@pytest.mark.parametrize("rank", range(3))
def test_a_collective_that_differs_is_named(issues_of, rank, changes):
    issues_of[rank][1] = issues_of[rank][1]._replace(**changes)
    with pytest.raises(
        PlanError, match=rf"communicator dispatch of slot 0: collective 1 is .* on rank {rank or 1}, .* on rank 0"
    ):
        match(issues_of)


def test_a_collective_that_is_missing_is_named(issues_of):
    last = max(n for n, i in enumerate(issues_of[2]) if i.communicator == "dispatch")
    del issues_of[2][last]
    with pytest.raises(PlanError, match="communicator dispatch of slot 0: collective 3 is missing on rank 2"):
        match(issues_of)


@pytest.mark.parametrize("fault", ["bytes", "missing", "other side"])
def test_a_send_that_no_receive_meets_is_named(fault):
    p = planned(combine="gather")
    issues_of = [project(p, rank, ROW, VALUE) for rank in range(3)]
    at = next(n for n, i in enumerate(issues_of[1]) if i.primitive == "send" and i.peer == 2)
    if fault == "missing":
        del issues_of[1][at]
    else:
        change = {"num_bytes": 4} if fault == "bytes" else {"peer": 0}
        issues_of[1][at] = issues_of[1][at]._replace(**change)
    with pytest.raises(
        PlanError, match=r"communicator combine of slot 0: rank 1 sends \[.*\] bytes to rank (0|2), which receives"
    ):
        match(issues_of)


def test_ranks_may_interleave_communicators_differently(issues_of):
    issues_of[1].sort(key=lambda i: i.communicator)
    match(issues_of)


def test_the_same_calls_on_another_slot_do_not_match(issues_of):
    issues_of[2] = [i._replace(slot=1) for i in issues_of[2]]
    with pytest.raises(PlanError, match="of slot 0: .* missing on rank 2|of slot 0: rank"):
        match(issues_of)


def test_the_plan_says_which_form():
    """Mode auto gathers waves of equal segments; the projection follows the plan, not the mode's name."""
    even = plan(Facts(((4,), (4,))), SHAPE, PlanConfig(mode="auto", max_tokens_per_rank=100))
    assert {i.primitive for i in project(even, 0, ROW, VALUE)} == {"all_gather", "reduce_scatter"}
    plain = replace(even, config=replace(even.config, mode="broadcast"))
    assert {i.primitive for i in project(plain, 0, ROW, VALUE)} == {"broadcast", "reduce"}
