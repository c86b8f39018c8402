"""A source that writes its rows itself: when it is given their place, which that is, and what waits for it."""

import pytest

from pipemoe.plan.schedule import Facts, OpKind
from tests.runtime.noted_run import noted_run
from tests.runtime.test_run import issued

RANK = 2
ONE_WAVE = {"num_layers": 4, "mode": "broadcast", "writes_rows": True}


def test_rows_are_written_where_the_broadcast_sends_from_and_nothing_is_packed():
    made, found = issued(RANK, **ONE_WAVE)
    cohort = made.plan.cohorts[0]
    (segment,) = (s for s in cohort.waves[0].segments if s.rank == RANK)
    attended, read = {}, {}
    for op, entries in found:
        buffer = made.plan.buffer(*op[1:])
        if op.kind is OpKind.ATTEND:
            ((attended[op.layer], did, waits),) = entries
            assert did == [f"attend {segment.num_rows} in place"]
            assert set(waits) >= {read[buffer]} if buffer in read else True
            rows = made.source.given[0, op.layer]
            slot = made.workspace.slots[cohort.slot].receive[buffer]
            assert rows.buffer.data_ptr() == slot[segment.row].data_ptr() and len(rows) == segment.num_rows
        elif op.kind is OpKind.DISPATCH:
            ((_, did, waits),) = entries
            assert did[0].startswith("send") and waits == [attended[op.layer]]
        elif op.kind is OpKind.EXPERTS:
            read[buffer] = entries[-1][0]
    assert len(attended) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "chunked", "moe_max_num_tokens": 35},  # several waves
        {"mode": "padded"},  # ids of padding rows are cleared when a wave is packed
        {"mode": "broadcast", "facts": Facts(((30,), (3, 5))), "writes_rows": False},
    ],
    ids=["several waves", "padded", "a source that does not write"],
)
def test_else_they_are_packed(options):
    made, found = issued(1, **{**ONE_WAVE, **options})
    assert set(made.source.given.values()) == {None}
    packed = [work for op, entries in found if op.kind is OpKind.DISPATCH for work in entries[:-1]]
    assert packed and all(did[0].startswith("pack") for _, did, _ in packed)


def test_rows_of_a_failed_attend_go_to_no_expert():
    made = noted_run(RANK, **ONE_WAVE)
    made.source.fails_at = {(0, 2)}
    made.to_the_end()
    assert isinstance(made.run.failure, ValueError)
    given = made.source.given
    assert bool((given[0, 2].ids == -1).all()) and (0, 3) not in given
