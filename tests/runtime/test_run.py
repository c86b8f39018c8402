"""What each operation of a run waits for, in any plan; what is sent in place of failed rows; what a caller holds up.

Lanes run work at once and write it down, so that a missing wait shows, where on real ones it would only be a race.
"""

import pytest

from pipemoe.plan.schedule import Facts, Op, OpKind
from tests.runtime.noted_run import FACTS, noted_run

CHUNKS = Facts(((30,), (), (24, 9)))


def issued(rank, **options):
    """The run, and the pieces of work of each operation as issued: [(operation, [(name, what it did, waits)])]."""
    made = noted_run(rank, on_progress=lambda log, op: log.append(op), **options)
    made.to_the_end()
    found = []
    for entry in made.log:
        if isinstance(entry, Op):
            found.append((entry, []))
        else:
            found[-1][1].append(entry)
    assert sorted(op for op, _ in found) == sorted(made.plan.ops)
    return made, found


CASES = {
    "three waves": {"num_layers": 3, "moe_max_num_tokens": 35},
    "one wave": {"num_layers": 4},
    "uncapped": {"num_layers": 3, "mode": "broadcast"},
    "padded": {"num_layers": 3, "mode": "padded"},
    "a slot each": {"num_layers": 2, "mode": "per_rank", "num_slots": 5, "moe_max_num_tokens": 15},
    "cohorts one after another": {"num_layers": 2, "mode": "per_rank", "num_slots": 2, "moe_max_num_tokens": 15},
    "chunks side by side": {
        "num_layers": 3,
        "mode": "two_batch",
        "num_slots": 2,
        "facts": CHUNKS,
        "moe_max_num_tokens": 12,
    },
    "chunks one after another": {
        "num_layers": 3,
        "mode": "two_batch",
        "num_slots": 1,
        "facts": CHUNKS,
        "moe_max_num_tokens": 12,
    },
}


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("name", CASES)
def test_everything_waits_for_what_it_needs_and_for_nothing_else(name, rank):
    made, found = issued(rank, **CASES[name])
    p, ends = made.plan, {}  # by operation: the name of its last piece of work
    last = {}  # by kind, slot and buffer: the last operation that used it
    for op, entries in found:
        slot, own = (
            p.cohorts[op.cohort].slot,
            [w for w, wave in enumerate(p.cohorts[op.cohort].waves) if rank in wave.ranks()],
        )
        place = slot, p.buffer(op.cohort, op.layer, op.wave)

        def users(*kinds):
            return [ends[last[kind, *place]] for kind in kinds if (kind, *place) in last]

        def own_sums(layer):
            return [ends[Op(OpKind.COMBINE, op.cohort, layer, w)] for w in own if layer >= 0]

        packed = entries[:-1]
        if op.kind is OpKind.ATTEND:
            wanted = own_sums(op.layer - 1) + [
                ends[Op(OpKind.ATTEND, e, op.layer, 0)] for e in p.causal_predecessors[op.cohort]
            ]
            wanted += [ends[Op(OpKind.ATTEND, e, op.layer - 1, 0)] for e in p.pacemakers[op.cohort] if op.layer]
        elif op.kind is OpKind.DISPATCH and (op.wave in own or p.config.mode == "padded"):
            (pack,) = packed
            assert pack[0].startswith("compute") and pack[2] == sorted(users(OpKind.EXPERTS))
            wanted, packed = [pack[0]], []
        elif op.kind is OpKind.DISPATCH:
            wanted = users(OpKind.EXPERTS)
        elif op.kind is OpKind.EXPERTS:
            wanted = users(OpKind.DISPATCH, OpKind.COMBINE)
            assert last[OpKind.DISPATCH, *place] == op._replace(kind=OpKind.DISPATCH)
        elif op.kind is OpKind.COMBINE:
            wanted = [ends[op._replace(kind=OpKind.EXPERTS)]]
        else:
            wanted = own_sums(op.layer) + [
                ends[Op(OpKind.FINISH, e, op.layer, 0)] for e in p.causal_predecessors[op.cohort]
            ]
        name, _, waits = entries[-1]
        lane = {OpKind.DISPATCH: "dispatch", OpKind.COMBINE: "combine"}.get(op.kind, "compute")
        assert name.rsplit(" ", 1)[0] == (lane if not slot else f"{lane} of {slot}")
        assert waits == sorted(wanted) and not packed, op
        ends[op], last[op.kind, *place] = name, op


@pytest.mark.parametrize("mode", ["chunked", "padded"])
def test_rows_of_failed_model_code_are_for_no_expert(mode):
    """The others still get the rows that they expect, and padding that no expert takes."""
    made = noted_run(1, num_layers=2, mode=mode)
    for slot in made.workspace.slots:
        for buffer in slot.receive:
            made.wire.rows(buffer).ids.fill_(5)
    made.source.fails_at.add((0, 1))
    seen = []
    (wave,) = made.plan.cohorts[0].waves
    (own,) = [s for s in wave.segments if s.rank == 1]
    block = (
        range(wave.num_rows // 5, 2 * wave.num_rows // 5)
        if mode == "padded"
        else range(own.row, own.row + own.num_rows)
    )
    send = made.run._transport.dispatch

    def dispatch(slot, buffer, group, exchange, rows):
        ids = made.wire.rows(rows).ids
        assert (ids[: block.start] == 5).all() and (ids[block.stop :] == 5).all()
        seen.append([ids[row, 0].item() for row in block])
        send(slot, buffer, group, exchange, rows)

    made.run._transport.dispatch = dispatch
    made.to_the_end()
    padding = [-1] * (len(block) - own.num_rows)
    assert len(padding) == (20 if mode == "padded" else 0)
    assert seen == [[0] * own.num_rows + padding, [-1] * own.num_rows + padding]
    assert str(made.run.failure) == "planted in layer 1" and made.log[-1][1] == []  # finish: not called
    assert made.run.own_finished == made.run.num_own == 1


def test_a_cohort_that_waits_for_its_caller_holds_up_no_other():
    """Cohort 0 is never ready: all others run to their end."""
    made = noted_run(0, num_layers=2, mode="per_rank", num_slots=5)
    (mine,) = [c for c, cohort in enumerate(made.plan.cohorts) if cohort.tokens_of(0)]
    ready = set()
    made.source.ready = lambda cohort, layer: cohort in ready
    for _ in range(20):
        assert not made.run.advance()
    assert made.run.oldest() is None and made.run.own_finished == 0
    assert sum(entry[1] == ["experts"] for entry in made.log) == 2 * 4
    ready.add(mine)
    made.to_the_end()
    assert made.run.own_finished == 1 and sum(entry[1] == ["experts"] for entry in made.log) == 2 * 5


def test_the_oldest_operation_is_the_first_that_is_not_done():
    made = noted_run(1, hold={"dispatch"}, num_layers=2, facts=FACTS)
    made.run.advance()
    assert made.run.oldest() == Op(OpKind.ATTEND, 0, 0, 0)
    made.run.advance()
    assert made.run.oldest() == Op(OpKind.DISPATCH, 0, 0, 0)


def test_a_cohort_finishes_behind_those_whose_keys_it_reads():
    """Cohort 0 has the first half of each sequence. The bound on groups holds it up; cohort 1 could end."""
    hold = {"dispatch"}
    made = noted_run(0, hold, facts=CHUNKS, mode="two_batch", num_slots=2, moe_max_num_tokens=6)
    assert made.plan.causal_predecessors == ((), (0,)) and len(made.plan.cohorts[0].waves) == 6
    for _ in range(10):
        assert not made.run.advance()
    assert sum(entry[1] == ["experts"] for entry in made.log if entry[0].startswith("compute of 1")) == 6
    assert not any("finish" in entry[1] for entry in made.log)
    hold.clear()
    made.to_the_end()
    finishes = [entry for entry in made.log if "finish" in entry[1]]
    assert [entry[0].rsplit(" ", 1)[0] for entry in finishes] == ["compute", "compute of 1"]
    assert finishes[0][0] in finishes[1][2]
