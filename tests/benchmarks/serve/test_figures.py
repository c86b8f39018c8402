"""What the serve benchmark says of its rows: verdicts, table, pictures, timelines."""

import json

import pytest

from benchmarks.serve.judge import judge, verdict_cells, verdicts
from benchmarks.serve.plot import labels_of, plot_distributions, plot_rates
from benchmarks.serve.table import serve_cells, serve_table
from benchmarks.serve.timeline import request_timeline, write_timeline
from pipemoe.traffic.served import Served


def row(label, what="load", load=0.7, seed=0, p50=10.0, short=20.0, capacity=None, per_s=5.0):
    fields = ("ttft_ms_p95", "ttft_ms_p99", "ttft_ms_p50_short", "ttft_ms_p95_long", "queueing_ms_p50", "tokens_per_s")
    about = {"policy": label.split()[0], "label": label, "what": what, "arrivals": what == "load" and "trace" or None}
    figures = {"ttft_ms_p50": p50, "ttft_ms_p95_short": short, "capacity_rps": capacity, "requests_per_s": per_s}
    rates = {"load": load, "rate_rps": load and 10 * load, "seed": seed, "ttft_curve_ms": [p50 + n for n in range(101)]}
    return {**dict.fromkeys(fields, 30.0), **about, **figures, **rates, "trace": "azure", "model": "small"}


ROWS = [
    row("closed_step", "alone", None, p50=4.0),
    row("rolling", "alone", None, p50=5.0),
    row("rolling", "saturation", 1.1, per_s=5.0),
    row("lockstep 64", "saturation", 1.0, per_s=4.0),
    *(row("rolling", seed=s, p50=10 + s, short=20, capacity=9.0) for s in range(3)),
    *(row("lockstep 64", seed=s, p50=22 + s, short=90, capacity=6.0) for s in range(3)),
    *(row("lockstep 128", seed=s, p50=30, short=60, capacity=None) for s in range(3)),
]


def test_rolling_is_judged_against_the_best_lockstep_in_each_figure():
    found = {(v.about, v.seed): v for v in judge(ROWS)}
    assert found["trace: capacity", 2].ratio == pytest.approx(1.5)
    p50 = found["trace, load 0.7: half of all first tokens", 1]
    short = found["trace, load 0.7: 95 % of the short half's", 1]
    assert (p50.rolling, p50.other, p50.best) == (11, 23, "lockstep 64") and p50.ratio == pytest.approx(23 / 11)
    assert (short.best, short.ratio) == ("lockstep 128", pytest.approx(3))
    assert found["all at once: throughput", 0].ratio == pytest.approx(1.25)
    alone = found["one at a time", 0]
    assert alone.best == "closed_step" and alone.ratio == pytest.approx(0.8)
    assert verdicts(ROWS)[0] == "azure, trace: capacity, seed 0: rolling 9 requests/s, lockstep 64 6 requests/s: 1.50 x"
    assert verdict_cells(ROWS)[1] == [
        *("azure", "trace: capacity", "0", "9 requests/s", "6 requests/s"),
        *("lockstep 64", "1.50 x"),
    ]


def test_a_policy_is_compared_only_where_its_requests_are_rollings_too():
    """A policy that was left out after the first seed says nothing of the second one's requests."""
    rows = [
        *(row("rolling", seed=s, p50=p50) for s, p50 in ((0, 10.0), (1, 40.0))),
        *(row("lockstep 64", seed=s, p50=p50) for s, p50 in ((0, 30.0), (1, 50.0), (2, 5.0))),
        row("lockstep 128", seed=0, p50=20.0),
    ]
    found = [(v.seed, v.best, v.ratio) for v in judge(rows) if v.about.endswith("half of all first tokens")]
    assert found == [(0, "lockstep 128", pytest.approx(2)), (1, "lockstep 64", pytest.approx(1.25))]


def test_without_one_side_there_is_no_verdict():
    assert judge([r for r in ROWS if r["policy"] == "rolling"]) == []
    assert judge([]) == []


def test_table():
    text = serve_table(ROWS)
    assert text.startswith("model small, trace azure\n") and "lockstep 128" in text
    assert all(len(line) == len(serve_cells(ROWS)[0]) for line in serve_cells(ROWS))
    assert labels_of(ROWS) == ["closed_step", "rolling", "lockstep 64", "lockstep 128"]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]])
def test_pictures(tmp_path, rows):
    pytest.importorskip("matplotlib")
    for draw in (plot_rates, plot_distributions):
        draw(rows, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_timeline_has_each_request_wait_and_run_and_none_upon_another(tmp_path):
    served = [
        Served(0, 0, 5, 0.0, 0.001, 0.01),
        Served(1, 1, 6, 0.0, 0.0, 0.004),
        Served(2, 0, 7, 0.002, 0.003, 0.006),
        Served(3, 0, 8, 0.02, None, None),
        Served(4, 0, 9, 0.011, 0.011, 0.02),
    ]
    write_timeline(served, tmp_path / "timeline.json")
    document = json.loads((tmp_path / "timeline.json").read_text())
    assert document == request_timeline(served)
    spans = [e for e in document["traceEvents"] if e["ph"] == "X"]
    assert [(e["args"]["request"], e["pid"], e["tid"]) for e in spans if e["name"] == "runs"] == [
        (0, 0, 1),
        (2, 0, 2),
        (4, 0, 1),
        (1, 1, 1),
    ]
    first = [e for e in spans if e["args"]["request"] == 0]
    assert [(e["name"], e["ts"], e["dur"]) for e in first] == [("waits", 0, 1e3), ("runs", 1e3, pytest.approx(9e3))]
