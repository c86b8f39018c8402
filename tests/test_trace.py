"""Timelines: intervals, the overlap figures, and the Chrome trace document."""

import json

from hypothesis import given
from hypothesis import strategies as st

from pipemoe.plan.schedule import Op, OpKind
from pipemoe.trace import Span, Timeline, chrome_trace, intersection, length, overlap_percent, union

INTERVALS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda t: (min(t), max(t))), max_size=12)


def covered(intervals):
    return {t for begin, end in intervals for t in range(begin, end)}


@given(INTERVALS, INTERVALS)
def test_intervals_against_sets_of_unit_steps(a, b):
    assert length(union(a)) == len(covered(a))
    assert length(intersection(union(a), union(b))) == len(covered(a) & covered(b))


def span(kind, begin, end, cohort=0):
    return Span(Op(kind, cohort, 0, 0), begin, end)


def test_exposed_is_communication_without_computation():
    timeline = Timeline(
        [span(OpKind.DISPATCH, 0, 4), span(OpKind.EXPERTS, 1, 2), span(OpKind.ATTEND, 6, 8), span(OpKind.COMBINE, 7, 9)]
    )
    assert timeline.exposed_seconds() == 3 + 1


def test_overlap_percent_is_osus():
    assert overlap_percent(overall=10, computation=10, communication=4) == 100
    assert overlap_percent(overall=14, computation=10, communication=4) == 0
    assert overlap_percent(overall=11, computation=10, communication=4) == 75
    assert overlap_percent(overall=99, computation=10, communication=4) == 0
    assert overlap_percent(overall=10, computation=10, communication=0) is None


def test_chrome_trace_has_processes_lanes_spans_and_arrows():
    timelines = [
        Timeline([span(OpKind.DISPATCH, 10.0, 10.5), span(OpKind.EXPERTS, 10.5, 11.0)]),
        Timeline([span(OpKind.ATTEND, 10.25, 10.5, cohort=1)]),
    ]
    rows = json.loads(json.dumps([t.as_rows() for t in timelines]))
    assert [Timeline.from_rows(r).spans for r in rows] == [t.spans for t in timelines]
    document = json.loads(json.dumps(chrome_trace(timelines)))
    spans = [e for e in document["traceEvents"] if e["ph"] == "X"]
    assert [(e["pid"], e["name"], e["ts"], e["dur"]) for e in spans] == [
        (0, "dispatch", 0.0, 5e5),
        (0, "experts", 5e5, 5e5),
        (1, "attend", 2.5e5, 2.5e5),
    ]
    start, finish = (next(e for e in document["traceEvents"] if e["ph"] == ph) for ph in "sf")
    assert start["id"] == finish["id"] and start["tid"] != finish["tid"] and start["ts"] <= finish["ts"]
    assert {e["args"]["name"] for e in document["traceEvents"] if e["name"] == "process_name"} == {"rank 0", "rank 1"}


def test_chrome_trace_follows_perfettos_rules():
    """Arrow ids are numbers and belong to one dispatch of one rank; no thread is 0, and none has two lanes."""
    timelines = [
        Timeline(
            Span(Op(kind, cohort, layer, wave), at, at + 1)
            for at, kind in enumerate((OpKind.ATTEND, OpKind.DISPATCH, OpKind.EXPERTS, OpKind.COMBINE))
            for cohort in range(3)
            for layer in range(2)
            for wave in range(2)
        )
        for _ in range(3)
    ]
    events = json.loads(json.dumps(chrome_trace(timelines)))["traceEvents"]
    begins, ends = ([e for e in events if e["ph"] == ph] for ph in "sf")
    assert all(type(e["id"]) is int and e["id"] > 0 for e in begins + ends)
    assert len({e["id"] for e in begins}) == len(begins) == 3 * 12
    assert sorted((e["id"], e["pid"]) for e in begins) == sorted((e["id"], e["pid"]) for e in ends)
    assert all(e["tid"] >= 1 for e in events if "tid" in e)
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert len(set(names.values())) * len(timelines) == len(names)
    assert {(e["pid"], e["tid"]) for e in events if "tid" in e} == set(names)
