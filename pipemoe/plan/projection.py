"""What each rank issues for a plan, collective by collective: what real logs are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pipemoe.errors import PlanError
from pipemoe.plan.schedule import OpKind, Plan, Segment, Wave

POINT_TO_POINT = ("send", "recv")


class Issue(NamedTuple):
    """One call of one rank on a communicator. `peer` is the root, or the other side of a send or recv; -1 for all
    ranks.
    """

    communicator: str  # "dispatch" or "combine", with `slot`
    slot: int
    buffer: int
    primitive: str  # broadcast, all_gather, reduce, reduce_scatter, send, recv
    peer: int
    num_bytes: int


def project(plan: Plan, rank: int, row_bytes: int, sum_bytes: int) -> list[Issue]:
    """The calls of `rank`, in the plan's order. row_bytes: of a dispatched row. sum_bytes: of a value of a sum."""
    issues: list[Issue] = []
    for op in plan.ops:
        if op.kind not in (OpKind.DISPATCH, OpKind.COMBINE):
            continue
        cohort, buffer = plan.cohorts[op.cohort], plan.buffer(op.cohort, op.layer, op.wave)
        communicator = op.kind.name.lower()
        size = row_bytes if op.kind is OpKind.DISPATCH else sum_bytes * plan.shape.hidden
        for primitive, peer, rows in _calls(plan, rank, op.kind, cohort.waves[op.wave]):
            issues.append(Issue(communicator, cohort.slot, buffer, primitive, peer, rows * size))
    return issues


def _calls(plan: Plan, rank: int, kind: OpKind, wave: Wave) -> Iterator[tuple[str, int, int]]:
    """Primitive, peer and rows of each call of a dispatch, or of a combine."""
    padded = plan.exchange(wave) == "padded"
    if kind is OpKind.DISPATCH and padded:
        yield "all_gather", -1, wave.num_rows
    elif kind is OpKind.DISPATCH:
        for segment in wave.segments:
            yield "broadcast", segment.rank, segment.num_rows
    elif plan.config.combine == "gather":
        for primitive, peer, segment in gather_calls(wave, rank, plan.facts.num_ranks):
            yield primitive, peer, segment.num_rows
    elif padded:
        yield "reduce_scatter", -1, wave.num_rows
    else:
        for segment in wave.segments:
            yield "reduce", segment.rank, segment.num_rows


def gather_calls(wave: Wave, rank: int, num_ranks: int) -> Iterator[tuple[str, int, Segment]]:
    """The calls of `rank` for combine="gather", in order: "send" or "recv", the other side, and the segment."""
    for segment in wave.segments:
        if segment.rank != rank:
            yield "send", segment.rank, segment
        else:
            yield from (("recv", peer, segment) for peer in range(num_ranks) if peer != rank)


def match(issues_of: list[list[Issue]]) -> None:
    """Check that the ranks' calls fit together on every communicator: the same collectives in the same order, with the
    same root and bytes, and a receive for every send. Raises PlanError naming communicator, position and both sides.
    """
    for key in sorted({(i.communicator, i.slot) for issues in issues_of for i in issues}):
        on = [[i for i in issues if (i.communicator, i.slot) == key] for issues in issues_of]
        name = f"communicator {key[0]} of slot {key[1]}"
        collectives = [[i for i in issues if i.primitive not in POINT_TO_POINT] for issues in on]
        for rank, mine in enumerate(collectives):
            if mine != collectives[0]:
                at = next(
                    (n for n, (a, b) in enumerate(zip(mine, collectives[0])) if a != b),
                    min(len(mine), len(collectives[0])),
                )
                raise PlanError(
                    f"{name}: collective {at} is {_at(mine, at)} on rank {rank}, {_at(collectives[0], at)} on rank 0"
                )
        for a in range(len(on)):
            for b in range(len(on)):
                sent = [i.num_bytes for i in on[a] if i.primitive == "send" and i.peer == b]
                received = [i.num_bytes for i in on[b] if i.primitive == "recv" and i.peer == a]
                if sent != received:
                    raise PlanError(
                        f"{name}: rank {a} sends {sent[:8]} bytes to rank {b}, which receives {received[:8]}"
                    )


def _at(issues: list[Issue], at: int) -> str:
    return str(issues[at]) if at < len(issues) else "missing"
