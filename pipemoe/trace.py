"""Timelines: when each operation ran on which lane, as Chrome trace JSON, and how much communication was exposed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from pipemoe.plan.schedule import Op, OpKind

COMPUTATION = (OpKind.ATTEND, OpKind.EXPERTS, OpKind.FINISH)
COMMUNICATION = (OpKind.DISPATCH, OpKind.COMBINE)
Interval = tuple[float, float]


class Span(NamedTuple):
    """One operation on one rank, in seconds of the host's monotonic clock."""

    op: Op
    begin: float
    end: float


class Timeline:
    """The spans of one rank's step."""

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self.spans = list(spans)
        self.issue_seconds: list[tuple[Op, float]] = []  # the conductor's thread spent issuing each operation

    def take(self, spans: Iterable[Span], issue_seconds: Iterable[tuple[Op, float]] = ()) -> None:
        """Add the operations of a timed run."""
        self.spans += spans
        self.issue_seconds += issue_seconds

    def busy(self, kinds: tuple[OpKind, ...]) -> list[Interval]:
        """When at least one operation of `kinds` ran, as disjoint intervals in order."""
        return union((s.begin, s.end) for s in self.spans if s.op.kind in kinds)

    def exposed_seconds(self) -> float:
        """Time in which communication was under way on this rank and no computation was."""
        communication, computation = self.busy(COMMUNICATION), self.busy(COMPUTATION)
        return length(communication) - length(intersection(communication, computation))

    def as_rows(self) -> list[list]:
        """Plain numbers, for sending to another rank: kind, cohort, layer, wave, begin, end."""
        return [[*(int(v) for v in s.op), s.begin, s.end] for s in self.spans]

    @classmethod
    def from_rows(cls, rows: list[list]) -> Timeline:
        return cls(
            Span(Op(OpKind(kind), cohort, layer, wave), begin, end) for kind, cohort, layer, wave, begin, end in rows
        )


def union(intervals: Iterable[Interval]) -> list[Interval]:
    out: list[Interval] = []
    for begin, end in sorted(intervals):
        if out and begin <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((begin, end))
    return out


def intersection(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """The intersection of two lists of disjoint intervals, each in order."""
    out, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        begin, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if begin < end:
            out.append((begin, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return out


def length(intervals: list[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def overlap_percent(overall: float, computation: float, communication: float) -> float | None:
    """OSU's figure for hidden communication: 100 (1 - (overall - computation) / communication alone), within 0 to 100.

    All three in the same unit, each measured by itself. None when there is no communication to hide.
    Source: OSU micro-benchmarks, non-blocking collectives.
    """
    if communication <= 0:
        return None
    return max(0.0, min(100.0, 100.0 * (1.0 - (overall - computation) / communication)))


def chrome_trace(timelines: list[Timeline]) -> dict:
    """All ranks' timelines as a Chrome trace document, which Perfetto opens.

    It has a process per rank and a thread per cohort and lane. Times are microseconds from the earliest span. An arrow
    leads from every dispatch to the experts call that reads its rows.

    Perfetto reads an arrow's id as a number, the same one for arrows of all processes, and takes thread 0 for the
    process's idle thread. So arrows are numbered over all ranks, and threads from 1.
    """
    lanes = {OpKind.ATTEND: 0, OpKind.EXPERTS: 0, OpKind.FINISH: 0, OpKind.DISPATCH: 1, OpKind.COMBINE: 2}
    names = ("compute", "dispatch", "combine")
    start = min((s.begin for t in timelines for s in t.spans), default=0.0)
    events: list[dict] = []
    arrows: dict[tuple[int, int, int, int], int] = {}  # by rank, cohort, layer and wave
    for rank, timeline in enumerate(timelines):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        for cohort in sorted({s.op.cohort for s in timeline.spans}):
            for lane, name in enumerate(names):
                events.append(
                    {
                        "ph": "M",
                        "name": "thread_name",
                        "pid": rank,
                        "tid": 1 + 3 * cohort + lane,
                        "args": {"name": f"cohort {cohort} {name}"},
                    }
                )
        for s in timeline.spans:
            where = {"pid": rank, "tid": 1 + 3 * s.op.cohort + lanes[s.op.kind]}
            begin, end = (s.begin - start) * 1e6, (s.end - start) * 1e6
            args = {"cohort": s.op.cohort, "layer": s.op.layer, "wave": s.op.wave}
            events.append(
                {
                    "ph": "X",
                    "name": s.op.kind.name.lower(),
                    "cat": names[lanes[s.op.kind]],
                    "ts": begin,
                    "dur": end - begin,
                    "args": args,
                    **where,
                }
            )
            if s.op.kind in (OpKind.DISPATCH, OpKind.EXPERTS):
                number = arrows.setdefault((rank, s.op.cohort, s.op.layer, s.op.wave), len(arrows) + 1)
                arrow = {"name": "rows", "cat": "dispatch", "id": number, **where}
                if s.op.kind is OpKind.DISPATCH:
                    events.append({"ph": "s", "ts": end, **arrow})
                else:
                    events.append({"ph": "f", "bp": "e", "ts": begin, **arrow})
    return {"traceEvents": events, "displayTimeUnit": "ms"}
