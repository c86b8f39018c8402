"""The waits of a transport over shared memory: enough for every plan, and none of them too many."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.errors import PlanError
from pipemoe.plan import reuse
from pipemoe.plan.config import MODES, PlanConfig
from pipemoe.plan.planner import plan
from pipemoe.plan.reuse import BufferUses, prove_reuse
from pipemoe.plan.schedule import Facts, OpKind
from tests.plan.cases import SHAPE

COUNTS = st.lists(st.lists(st.integers(1, 60), max_size=2).map(tuple), min_size=1, max_size=5).map(tuple)


@settings(max_examples=60, deadline=None)
@given(COUNTS.filter(any), st.sampled_from([mode for mode in MODES if mode != "auto"]), st.sampled_from([16, 24, 64]))
def test_every_plan_keeps_readers_safe(lengths, mode, most):
    prove_reuse(plan(Facts(lengths), SHAPE, PlanConfig(mode=mode, moe_max_num_tokens=most)))


@settings(max_examples=60, deadline=None)
@given(
    COUNTS.filter(lambda lengths: any(lengths) and len(lengths) > 1),
    st.lists(st.integers(0, 2), min_size=5, max_size=5),
    st.sampled_from([mode for mode in MODES if mode != "auto"]),
    st.sampled_from([16, 24, 64]),
)
def test_every_plan_keeps_readers_safe_on_several_hosts(lengths, hosts, mode, most):
    prove_reuse(
        plan(Facts(lengths), SHAPE, PlanConfig(mode=mode, moe_max_num_tokens=most)), hosts=hosts[: len(lengths)]
    )


def test_waves_are_numbered_by_slot_and_know_who_was_there_before():
    uses = BufferUses(2, 2)
    assert uses.next(0, 0, (0, 2)) == (1, (0, 2), 0, ())
    assert uses.next(0, 1, (1,)) == (2, (1,), 0, ())
    assert uses.next(1, 0, (1,)) == (1, (1,), 0, ())
    assert uses.next(0, 0, (1,)) == (3, (1,), 1, (0, 2))
    assert uses.next(0, 0, ()) == (4, (), 3, (1,))


class NoWaitForRows(BufferUses):
    def next(self, *place):
        return super().next(*place)._replace(before=0)


class NoWaitForSums(BufferUses):
    def next(self, *place):
        return super().next(*place)._replace(owners_before=())


class OneOwnerForgotten(BufferUses):
    def next(self, *place):
        use = super().next(*place)
        return use._replace(owners_before=use.owners_before[1:])


class SentByFewer(BufferUses):
    """Then experts may read rows that are yet to be written: their owner's next write does not know of them."""

    def next(self, slot, buffer, owners):
        return super().next(slot, buffer, owners[:-1] or owners)


class WaitsForItself(BufferUses):
    def next(self, *place):
        use = super().next(*place)
        return use._replace(before=use.number)


class WaitsForTheNext(BufferUses):
    def next(self, *place):
        use = super().next(*place)
        return use._replace(before=use.number + 1)


@pytest.fixture
def sound():
    """One rank has no rows in some waves, so it may run ahead of those that do."""
    return plan(
        Facts(((40, 9), (5,), (), (7, 8))), SHAPE, PlanConfig(mode="pipelined", moe_max_num_tokens=20, num_slots=2)
    )


@pytest.mark.parametrize(
    ("uses", "text"),
    [
        (NoWaitForRows, "write of rows .* may overtake experts"),
        (NoWaitForSums, "experts .* may overtake sum"),
        (OneOwnerForgotten, "experts .* may overtake sum"),
        (WaitsForItself, "waits for ever"),
        (WaitsForTheNext, "waits for ever|never comes"),
    ],
)
def test_a_wait_too_few_or_too_many(sound, uses, text):
    prove_reuse(sound)
    with pytest.raises(PlanError, match=f"buffers are free across ranks: .*({text})"):
        prove_reuse(sound, uses)


@pytest.mark.parametrize(
    ("uses", "text"),
    [
        (NoWaitForRows, "write of rows .* may overtake experts|message of rows .* may overtake experts"),
        (NoWaitForSums, "experts .* may overtake sum"),
        (WaitsForItself, "waits for ever"),
    ],
)
def test_a_wait_too_few_or_too_many_on_two_hosts(sound, uses, text):
    prove_reuse(sound, hosts=[0, 1, 1, 0])
    with pytest.raises(PlanError, match=f"buffers are free across ranks: .*({text})"):
        prove_reuse(sound, uses, hosts=[0, 1, 1, 0])


# What waits, for what of this rank; and what is said without that wait.
_WAITS_OF_MESSAGES = [
    (reuse._ROWS_POSTED, reuse.SUMMED, "message of rows .* may overtake experts"),  # what came before has been read
    (reuse.SUMMED, reuse._SUMS_MOVED, "experts .* may overtake arrival of sums"),  # sums before have been sent
    (reuse.SUMMED, reuse._ROWS_MOVED, "(message|write) of rows .* may overtake (arrival|experts)"),
    (reuse._SUMS_POSTED, reuse.SUMMED, "arrival of sums .* may come before experts"),
    (reuse._ROWS_POSTED, reuse.SENT, "arrival of rows .* may come before write of rows"),
    (reuse.COMBINED, reuse._SUMS_MOVED, "sum .* may come before arrival of sums"),
]


@pytest.mark.parametrize(("event", "source", "text"), _WAITS_OF_MESSAGES)
def test_every_wait_for_messages_is_needed(sound, monkeypatch, event, source, text):
    add = reuse._Proof._add

    def forgetful(self, rank, kind, buffer, number, needs):
        if kind == event:
            needs = [need for need in needs if need[:2] != (rank, source)]
        return add(self, rank, kind, buffer, number, needs)

    monkeypatch.setattr(reuse._Proof, "_add", forgetful)
    with pytest.raises(PlanError, match=f"buffers are free across ranks: .*({text})"):
        prove_reuse(sound, hosts=[0, 1, 1, 0])


def test_ranks_whose_order_makes_one_wait_for_ever(sound):
    """The experts of a wave stand before the dispatch of its rows."""
    ops = [tuple(op) for op in sound.ops]
    wave = next(op for op in ops if op[0] == OpKind.EXPERTS and op[1] == 1)
    ops.remove(wave)
    ops.insert(ops.index((OpKind.DISPATCH, *wave[1:])), wave)
    with pytest.raises((PlanError, KeyError)):
        prove_reuse(replace(sound, order=np.array(ops, np.int32)))
