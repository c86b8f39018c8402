"""A proof that a plan is sound. Each property is checked from its definition, not from how the planner works."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pipemoe.errors import ConfigError, PlanError
from pipemoe.plan.projection import Issue, match, project
from pipemoe.plan.reuse import prove_reuse
from pipemoe.plan.room import Room
from pipemoe.plan.schedule import OpKind, Plan


def verify(
    plan: Plan,
    *,
    row_bytes: int = 128,
    sum_bytes: int = 4,
    room: Room | None = None,
    issues: list[list[Issue]] | None = None,
    hosts: Sequence[int] | None = None,
) -> None:
    """Prove the properties of DESIGN.md for `plan`; raise PlanError naming the first that does not hold.

    issues: what each rank really issued, from the logs of a debug run; it is compared with what the plan says. hosts:
    the number of every rank's host; None for one host.
    """
    _every_token_once(plan)
    _every_op_once(plan)
    _order_respects_dependencies(plan)
    _buffers_have_one_user(plan)
    _workspace_is_bounded(plan)
    _chunks_in_causal_order(plan)
    prove_reuse(plan, hosts=hosts)
    _kernels_have_room(plan, room)
    projected = [project(plan, rank, row_bytes, sum_bytes) for rank in range(plan.facts.num_ranks)]
    match(projected)
    if issues is not None:
        match(issues)
        _issued_as_planned(projected, issues)
    if room is not None:
        try:
            room.check(plan.config.num_slots)
        except ConfigError as error:
            raise PlanError(str(error)) from None


def _fail(name: str, text: str) -> None:
    raise PlanError(f"{name}: {text}")


def _every_token_once(plan: Plan) -> None:
    """The segments hold every token of every rank exactly once, inside their wave and their cohort's microbatches."""
    name = "every token once"
    spans: list[list[tuple[int, int]]] = [[] for _ in plan.facts.tokens]
    for index, cohort in enumerate(plan.cohorts):
        for wave in cohort.waves:
            if not wave.segments:
                _fail(name, f"cohort {index} has a wave without rows")
            end = 0
            for s in sorted(wave.segments, key=lambda s: s.row):
                if s.start >= s.stop or s.row < end or s.row + s.num_rows > wave.num_rows:
                    _fail(name, f"cohort {index}: {s} overlaps another or leaves its wave of {wave.num_rows} rows")
                if not any(m.rank == s.rank and m.start <= s.start and s.stop <= m.stop for m in cohort.microbatches):
                    _fail(name, f"cohort {index}: {s} lies in none of its microbatches")
                end = s.row + s.num_rows
                spans[s.rank].append((s.start, s.stop))
    for rank, tokens in enumerate(plan.facts.tokens):
        at = 0
        for start, stop in sorted(spans[rank]):
            if start != at:
                _fail(
                    name,
                    f"rank {rank}: tokens from {min(at, start)} to {max(at, start)} are "
                    f"{'missing' if start > at else 'there twice'}",
                )
            at = stop
        if at != tokens:
            _fail(name, f"rank {rank}: segments end at token {at} of {tokens}")


def _every_op_once(plan: Plan) -> None:
    """Each cohort attends once a layer, each wave is dispatched, computed and combined once a layer, each cohort
    finishes once.
    """
    expected: Counter[tuple] = Counter()
    for c, cohort in enumerate(plan.cohorts):
        for layer in range(plan.shape.num_layers):
            expected[OpKind.ATTEND, c, layer, 0] += 1
            for kind in (OpKind.DISPATCH, OpKind.EXPERTS, OpKind.COMBINE):
                for w in range(len(cohort.waves)):
                    expected[kind, c, layer, w] += 1
        expected[OpKind.FINISH, c, plan.shape.num_layers - 1, 0] += 1
    found = Counter(tuple(op) for op in plan.ops)
    if found != expected:
        wrong = next(iter((found - expected) + (expected - found)))
        _fail("every operation once", f"{wrong} is there {found[wrong]} times, must be {expected[wrong]}")


def _order_respects_dependencies(plan: Plan) -> None:
    """Attend after the last layer's combines, dispatch after attend, experts after dispatch, combine after experts,
    finish last.
    """
    at = {tuple(op): i for i, op in enumerate(plan.ops)}

    def after(op: tuple, *earlier: tuple) -> None:
        for e in earlier:
            if at[op] < at[e]:
                _fail("order respects dependencies", f"{op} stands before {e}, which it needs")

    for c, cohort in enumerate(plan.cohorts):
        waves = range(len(cohort.waves))
        combines = [[(OpKind.COMBINE, c, layer, w) for w in waves] for layer in range(plan.shape.num_layers)]
        for layer in range(plan.shape.num_layers):
            attend = (OpKind.ATTEND, c, layer, 0)
            if layer:
                after(attend, *combines[layer - 1])
            for w in waves:
                after((OpKind.DISPATCH, c, layer, w), attend)
                after((OpKind.EXPERTS, c, layer, w), (OpKind.DISPATCH, c, layer, w))
                after(combines[layer][w], (OpKind.EXPERTS, c, layer, w))
        after((OpKind.FINISH, c, plan.shape.num_layers - 1, 0), *combines[-1])


def _buffers_have_one_user(plan: Plan) -> None:
    """A receive buffer is refilled only after its experts have read it, a partial-sum buffer only after its combine,
    and a slot is handed on only after its cohort has finished."""
    name = "buffers have one user"
    received: dict[tuple[int, int], tuple] = {}
    partial: dict[tuple[int, int], tuple] = {}
    user: dict[int, int] = {}
    for op in plan.ops:
        slot = plan.cohorts[op.cohort].slot
        if user.setdefault(slot, op.cohort) != op.cohort:
            _fail(name, f"{op}: slot {slot} still belongs to cohort {user[slot]}")
        if op.kind is OpKind.FINISH:
            del user[slot]
        key, wave = (slot, plan.buffer(op.cohort, op.layer, op.wave)), (op.cohort, op.layer, op.wave)
        if op.kind is OpKind.DISPATCH:
            if key in received:
                _fail(name, f"{op}: receive buffer {key} still holds wave {received[key]}")
            received[key] = wave
        elif op.kind is OpKind.EXPERTS:
            if received.pop(key, None) != wave:
                _fail(name, f"{op}: receive buffer {key} does not hold its rows")
            if key in partial:
                _fail(name, f"{op}: partial sums of wave {partial[key]} are still in buffer {key}")
            partial[key] = wave
        elif op.kind is OpKind.COMBINE:
            if partial.pop(key, None) != wave:
                _fail(name, f"{op}: buffer {key} does not hold its partial sums")


def _workspace_is_bounded(plan: Plan) -> None:
    """No wave is larger than the buffers the configuration allows, and no more slots are live than it has."""
    name = "workspace is bounded"
    limit = plan.config.max_wave_rows(plan.facts.num_ranks)
    for c, cohort in enumerate(plan.cohorts):
        if not 0 <= cohort.slot < plan.config.max_slots:
            _fail(name, f"cohort {c} uses slot {cohort.slot} of {plan.config.max_slots}")
        for wave in cohort.waves:
            if wave.num_rows > limit:
                _fail(name, f"cohort {c} has a wave of {wave.num_rows} rows, more than {limit}")
    rows, most = 0, 0
    for op in plan.ops:
        size = plan.cohorts[op.cohort].waves[op.wave].num_rows
        rows += size if op.kind is OpKind.DISPATCH else -size if op.kind is OpKind.COMBINE else 0
        most = max(most, rows)
    # a wave may be received while another's sums wait
    budget = plan.config.max_slots * 2 * plan.config.num_buffers * limit
    if most > budget:
        _fail(name, f"{most} rows are live at once, more than {budget}")


def _chunks_in_causal_order(plan: Plan) -> None:
    """In every layer, a chunk of a sequence attends after (or with) the chunks with the sequence's earlier tokens, and
    after what paces it. Otherwise a rank would wait for something that it issues later.
    """
    at = {(op.cohort, op.layer): i for i, op in enumerate(plan.ops) if op.kind is OpKind.ATTEND}
    for rank, starts in enumerate(plan.facts.boundaries):
        chunks = sorted(
            (m.start, m.stop, c) for c, cohort in enumerate(plan.cohorts) for m in cohort.microbatches if m.rank == rank
        )
        for (_, stop, earlier), (start, _, later) in zip(chunks, chunks[1:]):
            if earlier == later or stop in starts:
                continue
            for layer in range(plan.shape.num_layers):
                if at[earlier, layer] > at[later, layer]:
                    _fail(
                        "chunks in causal order",
                        f"rank {rank}, layer {layer}: tokens from {start} attend before those up to {stop}",
                    )

    for cohort, pacemakers in enumerate(plan.pacemakers):
        for other in pacemakers:
            for layer in range(1, plan.shape.num_layers):
                if at[other, layer - 1] > at[cohort, layer]:
                    _fail(
                        "chunks in causal order",
                        f"cohort {cohort} is to wait in layer {layer} for cohort {other}, which comes later",
                    )


def _kernels_have_room(plan: Plan, room: Room | None) -> None:
    """The experts' kernels keep some multiprocessors for themselves."""
    if plan.sms_left < 0 or (room is not None and plan.sms_left >= room.num_sms):
        there_are = "any number" if room is None else room.num_sms
        _fail("kernels have room", f"{plan.sms_left} multiprocessors are left to collectives, of {there_are}")


def _issued_as_planned(projected: list[list[Issue]], issues: list[list[Issue]]) -> None:
    """On each communicator, every rank issued what the plan says. Ranks may interleave communicators differently."""
    for rank, (wanted, found) in enumerate(zip(projected, issues, strict=True)):
        for key in sorted({(i.communicator, i.slot) for i in wanted + found}):
            a, b = ([i for i in of if (i.communicator, i.slot) == key] for of in (wanted, found))
            if a != b:
                at = next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
                _fail(
                    "issued as planned",
                    f"rank {rank}, communicator {key}: call {at} of {len(a)} planned and {len(b)} issued differs",
                )
