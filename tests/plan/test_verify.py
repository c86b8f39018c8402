"""`verify` catches a planted fault of every kind it claims to prove absent."""

from dataclasses import replace

import numpy as np
import pytest

from pipemoe.errors import ConfigError, PlanError
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.planner import plan
from pipemoe.plan.projection import project
from pipemoe.plan.room import Room
from pipemoe.plan.schedule import Facts, Microbatch, OpKind, Plan, Segment, Wave
from pipemoe.plan.verify import verify
from tests.plan.cases import SHAPE

FACTS = Facts(((40, 9), (5,), (), (7, 8)))


@pytest.fixture
def sound() -> Plan:
    """Two cohorts, one of them in several waves."""
    p = plan(FACTS, SHAPE, PlanConfig(mode="pipelined", moe_max_num_tokens=20))
    verify(p)
    assert len(p.cohorts) == 2 and len(p.cohorts[1].waves) == 3
    return p


def with_wave(p: Plan, cohort: int, wave: int, new: Wave) -> Plan:
    waves = list(p.cohorts[cohort].waves)
    waves[wave] = new
    cohorts = list(p.cohorts)
    cohorts[cohort] = replace(cohorts[cohort], waves=tuple(waves))
    return replace(p, cohorts=tuple(cohorts))


def swapped(p: Plan, first: tuple, second: tuple) -> Plan:
    """The order with two operations exchanged."""
    ops = [tuple(op) for op in p.ops]
    i, j = ops.index(first), ops.index(second)
    order = p.order.copy()
    order[[i, j]] = order[[j, i]]
    return replace(p, order=order)


def moved(p: Plan, op: tuple, before: tuple) -> Plan:
    """The order with `op` taken out and put in just before another."""
    ops = [tuple(o) for o in p.ops if tuple(o) != op]
    ops.insert(ops.index(before), op)
    return replace(p, order=np.array(ops, np.int32))


def test_missing_tokens(sound):
    s = sound.cohorts[1].waves[0].segments[0]
    shorter = Segment(s.rank, s.start + 1, s.stop, s.row)
    with pytest.raises(PlanError, match="every token once: rank 0: tokens from 0 to 1 are missing"):
        verify(with_wave(sound, 1, 0, Wave((shorter,), sound.cohorts[1].waves[0].num_rows)))


def test_missing_tokens_at_the_end(sound):
    last = sound.cohorts[1].waves[-1]
    *others, s = last.segments
    shorter = Wave((*others, s._replace(stop=s.stop - 1)), last.num_rows)
    with pytest.raises(PlanError, match="every token once: rank 0: segments end at token 48 of 49"):
        verify(with_wave(sound, 1, len(sound.cohorts[1].waves) - 1, shorter))


def test_segment_beyond_its_wave(sound):
    whole = sound.cohorts[0].waves[0]
    with pytest.raises(PlanError, match=f"leaves its wave of {whole.num_rows - 1} rows"):
        verify(with_wave(sound, 0, 0, whole._replace(num_rows=whole.num_rows - 1)))


def test_tokens_twice(sound):
    with pytest.raises(PlanError, match="every token once: rank 0: .* there twice"):
        verify(with_wave(sound, 1, 1, sound.cohorts[1].waves[0]))


def test_segment_of_no_microbatch(sound):
    with pytest.raises(PlanError, match="lies in none of its microbatches"):
        verify(with_wave(sound, 1, 0, Wave((Segment(2, 0, 5, 0),), 17)))


def test_overlapping_rows(sound):
    a, b = sound.cohorts[0].waves[0].segments[:2]
    with pytest.raises(PlanError, match="overlaps another"):
        verify(with_wave(sound, 0, 0, Wave((a, b._replace(row=a.row)), 20)))


def test_wave_without_rows(sound):
    with pytest.raises(PlanError, match="wave without rows"):
        verify(with_wave(sound, 0, 0, Wave((), 0)))


@pytest.mark.parametrize("change", ["drop", "repeat", "invent"])
def test_operations_not_exactly_once(sound, change):
    if change == "drop":
        order = sound.order[:-1]
    elif change == "repeat":
        order = np.vstack([sound.order, sound.order[3:4]])
    else:
        order = np.vstack([sound.order, [[OpKind.DISPATCH, 0, 99, 0]]])
    with pytest.raises(PlanError, match="every operation once"):
        verify(replace(sound, order=order))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((OpKind.ATTEND, 0, 1, 0), (OpKind.COMBINE, 0, 0, 0)),
        ((OpKind.DISPATCH, 0, 0, 0), (OpKind.ATTEND, 0, 0, 0)),
        ((OpKind.EXPERTS, 0, 0, 0), (OpKind.DISPATCH, 0, 0, 0)),
        ((OpKind.COMBINE, 0, 0, 0), (OpKind.EXPERTS, 0, 0, 0)),
        ((OpKind.FINISH, 0, 2, 0), (OpKind.COMBINE, 0, 2, 0)),
    ],
)
def test_order_against_a_dependency(sound, first, second):
    with pytest.raises(PlanError, match="order respects dependencies"):
        verify(swapped(sound, first, second))


def test_buffer_refilled_before_it_was_read(sound):
    with pytest.raises(PlanError, match="buffers have one user: .* receive buffer .* still holds wave"):
        verify(moved(sound, (OpKind.DISPATCH, 1, 0, 2), before=(OpKind.EXPERTS, 1, 0, 0)))


def test_partial_sums_overwritten_before_they_were_sent(sound):
    with pytest.raises(PlanError, match="buffers have one user: .* partial sums of wave .* are still in buffer"):
        verify(moved(sound, (OpKind.COMBINE, 1, 0, 0), before=(OpKind.COMBINE, 1, 0, 2)))


def test_slot_shared_by_two_cohorts_at_once(sound):
    cohorts = tuple(replace(c, slot=0) for c in sound.cohorts)
    with pytest.raises(PlanError, match="buffers have one user: .* slot 0 still belongs"):
        verify(replace(sound, cohorts=cohorts))


def test_wave_beyond_the_cap(sound):
    with pytest.raises(PlanError, match="workspace is bounded: cohort 0 has a wave of 20 rows"):
        verify(replace(sound, config=replace(sound.config, moe_max_num_tokens=19)))


@pytest.mark.parametrize("num_waves", [4, 5])
def test_more_rows_live_than_all_buffers_hold(monkeypatch, num_waves):
    """A slot's two buffers hold a wave that is received, and sums of one that wait, each: four waves.

    A plan that has more uses some buffer twice at once, which is found first: so without that check.
    """
    for check in ("_buffers_have_one_user", "prove_reuse"):
        monkeypatch.setattr(f"pipemoe.plan.verify.{check}", lambda p, **options: None)
    p = plan(Facts(((20 * (num_waves - 1),), (20,))), SHAPE, PlanConfig(mode="chunked", moe_max_num_tokens=20))
    assert [wave.num_rows for wave in p.cohorts[0].waves] == [20] * num_waves
    verify(p)
    layers = p.order[:, 2] * 10 + p.order[:, 0]  # kind by kind: all waves dispatched before any is combined
    all_at_once = replace(p, order=p.order[np.argsort(layers, kind="stable")])
    if num_waves == 4:
        verify(all_at_once)
    else:
        with pytest.raises(PlanError, match="workspace is bounded: 100 rows are live at once, more than 80"):
            verify(all_at_once)


@pytest.mark.parametrize("slot", [7, 4, -1])
def test_slot_that_does_not_exist(sound, slot):
    cohorts = (sound.cohorts[0], replace(sound.cohorts[1], slot=slot))
    with pytest.raises(PlanError, match=f"workspace is bounded: cohort 1 uses slot {slot} of 4"):
        verify(replace(sound, cohorts=cohorts))


def test_later_chunk_attends_first():
    halves = [[Microbatch(0, 0, 4)], [Microbatch(0, 4, 8)]]
    p = plan(Facts(((8,),)), SHAPE, PlanConfig(), assignment=halves)
    verify(p)
    with pytest.raises(PlanError, match="chunks in causal order: rank 0, layer 1"):
        verify(replace(p, order=_with_layer_exchanged(p, 1)))


def _with_layer_exchanged(p: Plan, layer: int) -> np.ndarray:
    """Cohort 1's operations of one layer before cohort 0's: sound but for causality."""
    ops = p.order.tolist()
    of = [[op for op in ops if op[1] == c] for c in (0, 1)]
    until = [[op for op in o if op[2] < layer] for o in of]
    at = [[op for op in o if op[2] == layer and op[0] != OpKind.FINISH] for o in of]
    rest = [[op for op in o if op[2] > layer or op[0] == OpKind.FINISH] for o in of]
    return np.array(until[0] + until[1] + at[1] + at[0] + rest[0] + rest[1], np.int32)


@pytest.mark.parametrize("combine", ["reduce", "gather"])
@pytest.mark.parametrize("fault", ["root", "bytes", "order", "missing"])
def test_ranks_that_issue_something_else(combine, fault):
    p = plan(FACTS, SHAPE, PlanConfig(mode="per_rank", moe_max_num_tokens=20, combine=combine))
    issues = [project(p, rank, 128, 4) for rank in range(4)]
    verify(p, issues=issues)
    mine = issues[2]
    if fault == "root":
        mine[1] = mine[1]._replace(peer=(mine[1].peer + 1) % 4)
    elif fault == "bytes":
        mine[1] = mine[1]._replace(num_bytes=mine[1].num_bytes + 128)
    elif fault == "order":
        same = [i for i, x in enumerate(mine) if (x.communicator, x.slot) == ("dispatch", 2)]
        mine[same[0]], mine[same[-1]] = mine[same[-1]], mine[same[0]]
    else:
        del mine[-1]
    with pytest.raises(PlanError, match="communicator (dispatch|combine) of slot [0-2]: .*rank 2"):
        verify(p, issues=issues)


def test_a_plan_that_makes_ranks_issue_different_things(sound, monkeypatch):
    def faulty(p, rank, *sizes):
        issues = project(p, rank, *sizes)
        return issues[1:] if rank == 2 else issues

    monkeypatch.setattr("pipemoe.plan.verify.project", faulty)
    with pytest.raises(PlanError, match="communicator dispatch of slot 0: collective 0 is .* on rank 2"):
        verify(sound)


def test_all_ranks_issue_the_same_wrong_thing(sound):
    issues = [project(sound, rank, 128, 4)[:-1] for rank in range(4)]
    with pytest.raises(PlanError, match="issued as planned|missing|communicator"):
        verify(sound, issues=issues)


def test_room_for_thread_blocks(sound):
    verify(sound, room=Room(num_sms=132, ctas=2, ranks_on_device=4))
    with pytest.raises(PlanError, match="no room for thread blocks: 4 ranks .* = 96 blocks, more than 66 of 132 SMs"):
        verify(sound, room=Room(num_sms=132, ctas=3, ranks_on_device=4))
    with pytest.raises(ConfigError, match="lower NCCL_MAX_CTAS"):
        Room(num_sms=132, ctas=9).check(4)
    Room(num_sms=132, ctas=1).check(32)
    with pytest.raises(ConfigError, match="= 66 blocks, more than 65 of 132 SMs"):  # two neighbours stay free
        Room(num_sms=132, ctas=1).check(33)


def test_kernels_that_leave_no_multiprocessor_to_themselves_are_found(sound):
    verify(replace(sound, sms_left=131), room=Room(num_sms=132, ctas=2))
    with pytest.raises(PlanError, match="kernels have room: 132 multiprocessors .* of 132"):
        verify(replace(sound, sms_left=132), room=Room(num_sms=132, ctas=2))
    with pytest.raises(PlanError, match="kernels have room: -1"):
        verify(replace(sound, sms_left=-1))


def test_a_chunk_ahead_of_what_paces_it_is_found():
    p = plan(Facts(((8,), (8,))), SHAPE, PlanConfig(mode="two_batch"))
    assert p.pacemakers == ((1,), ())
    first_whole = replace(p, order=p.order[np.argsort(p.order[:, 1], kind="stable")])
    with pytest.raises(PlanError, match="cohort 0 is to wait in layer 1 for cohort 1"):
        verify(first_whole)
    one_slot = plan(Facts(((8,), (8,))), SHAPE, PlanConfig(mode="two_batch", num_slots=1))
    assert one_slot.pacemakers == ((), ())
