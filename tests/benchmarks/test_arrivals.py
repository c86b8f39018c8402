"""benchmarks/arrivals.py as far as it goes without a GPU."""

import contextlib
import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import arrivals, delayed_wave, results_schema
from benchmarks.delayed_wave import forms_of, list_schedule, split
from benchmarks.kernels.cases import Layer
from pipemoe.errors import ConfigError


def test_segments_are_all_rows():
    assert split(4096, 4) == [1024] * 4
    assert split(10, 4) == [2, 3, 2, 3] and split(2, 3) == [0, 1, 1]


def test_forms():
    """Every form computes each row once, behind the group that brings it, and reduces each row behind its call."""
    forms = forms_of(1000, 250, [1, 3], [2, 4])
    assert [form.name for form in forms] == ["whole", "own first, 1", "own first, 3", "passes, 2", "passes, 4"]
    for form in forms:
        rows = [row for of_call, _ in form.calls for row in range(of_call.start, of_call.stop)]
        assert rows == list(range(1000)) and sum(num_rows for _, num_rows in form.reduces) == 1000
        brought = 1000 if form.name.startswith("passes") else 750
        assert sum(form.groups) == brought and [group for _, group in form.calls] == sorted(g for _, g in form.calls)
        for of_call, group in form.calls:
            wanted = 250 if group < 0 else form.groups[group] + (250 if form.name == "whole" else 0)
            assert of_call.stop - of_call.start == wanted
        done = 0
        for behind, num_rows in form.reduces:
            done += num_rows
            assert done <= form.calls[behind][0].stop
        parts = form.parts(1000)
        assert sum(num_rows for num_rows, _ in parts) == 1000
        assert [form.groups[group] for _, group in parts if group >= 0] == [n for n, group in parts if group >= 0]


def test_options():
    options = arrivals.parse(["--cases", "deepseek-v3:100,qwen3-30b-a3b:7", "--groups", "1,3", "--latencies", "0,9.5"])
    assert arrivals.parse(["--passes", "8"]).passes == [8]
    assert options.cases == [("deepseek-v3", 100), ("qwen3-30b-a3b", 7)] and options.ranks == 4
    assert options.groups == [1, 3] and options.latencies == [0.0, 9.5] and arrivals.parse([]).latencies is None
    for wrong in ("0", "x", "1,"):
        with pytest.raises(SystemExit):
            arrivals.parse(["--groups", wrong])
    assert arrivals.parse([]).cases == list(arrivals.CASES)
    for wrong in ("deepseek-v3", "deepseek-v3:0", "nobody:5"):
        with pytest.raises(SystemExit):
            arrivals.parse(["--cases", wrong])


def test_latencies_as_measured(tmp_path):
    def row(exchange, counts, size, least, median):
        return {"exchange": exchange, "counts": counts, "size": size, "time_us_min": least, "time_us": median}

    rows = [
        row("grouped_broadcast", "equal", 4096, 30.0, 50.0),
        row("grouped_broadcast", "equal", 1024, 37.04, 76.56),
        row("grouped_broadcast", "skewed", 512, 1.0, 2.0),
        row("all_gather", "equal", 256, 1.0, 2.0),
    ]
    (tmp_path / "comm.json").write_text(json.dumps({"rows": rows}))
    assert arrivals.measured_latencies(tmp_path / "comm.json") == [37.0, 76.6]
    assert len(arrivals.measured_latencies(arrivals.COMM)) == 2


def test_the_schedule_that_bounds_them():
    """By hand: two row tiles, each of two tiles of columns in the first GEMM and of one in the second."""
    tiles = [(0.0, (2, 1)), (0.5, (2, 1))]
    assert list_schedule(tiles, (1.0, 0.25), 2) == 2.25  # the second row tile ends last
    assert list_schedule(tiles, (1.0, 0.25), 4) == 1.75
    assert list_schedule([(3.0, (1, 1))], (1.0, 0.25), 2) == 4.25
    assert list_schedule(tiles, (1.0, 0.25), 1) == 4.5


class Event:
    """Points in time, a millisecond apart in the order in which they are recorded."""

    now = 0.0

    def __init__(self, **options):
        self.at = None

    def record(self):
        Event.now += 1.0
        self.at = Event.now

    def elapsed_time(self, later):
        return later.at - self.at


class Stream:
    """What is enqueued is done at once, so an event that it is told to wait for has been recorded."""

    def wait_event(self, event):
        assert event.at is not None


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in: launches do nothing, and experts give a row twice its hidden values."""
    if importlib.util.find_spec("numba_cuda") is None:
        pytest.skip("numba-cuda is not installed")
    from pipemoe.experts.factory import IMPLEMENTATIONS
    from pipemoe.experts.hopper import HopperExperts
    from pipemoe.runtime import stream_lanes
    from pipemoe_kernels.launch.kernel import Stream as KernelStream
    from tests.experts import cuda_stand_in

    cuda_stand_in.install(monkeypatch)
    monkeypatch.setitem(IMPLEMENTATIONS, "hopper", "cpu")
    call = HopperExperts.__call__

    def twice(experts, layer, rows, out, scratch):
        call(experts, layer, rows, out, scratch)
        out.copy_(2 * rows.hidden)

    slot = SimpleNamespace(dispatch=SimpleNamespace(stream=Stream()), combine=SimpleNamespace(stream=Stream()))
    monkeypatch.setattr(stream_lanes, "stream_lanes", lambda *arguments: SimpleNamespace(slots=[slot]))
    monkeypatch.setattr(HopperExperts, "__call__", twice)
    monkeypatch.setattr(HopperExperts, "warm_up", lambda experts, scratch: None)
    monkeypatch.setattr(KernelStream, "current", staticmethod(lambda device: KernelStream(0, 7)))
    for name, stand_in in {
        "is_available": lambda: True,
        "Event": Event,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in, raising=False)
    for module in (arrivals, delayed_wave):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(delayed_wave, "FLUSH_VALUES", 8)
    monkeypatch.setattr(arrivals, "LAYERS", {"a": Layer(256, 128, 16, 4, 2), "b": Layer(128, 256, 8, 8, 1)})
    return twice


def options_of(folder):
    few = ["--rounds", "2", "--latencies", "5,50", "--groups", "1,3", "--json", str(folder / "arrivals.json")]
    return arrivals.parse([*few, "--cases", "a:301,b:64,b:3"])  # of 3 rows, one of 4 ranks has none


def test_all_cases_and_forms_run(gpu, tmp_path, capsys):
    assert arrivals.run(options_of(tmp_path)) == 0
    rows = results_schema.read_results(tmp_path / "arrivals.json")["rows"]
    names = ["whole", "own first, 1", "own first, 3", "passes, 2", "passes, 4"]
    cases = [(layer, tokens, us) for layer, tokens in (("a", 301), ("b", 64), ("b", 3)) for us in (5.0, 50.0)]
    assert [(r["layer"], r["tokens"], r["latency_us"], r["form"]) for r in rows] == [
        (*case, name) for case in cases for name in names
    ]
    for row in rows:
        assert row["bound_ms"] > 0 and row["ms_over_bound"] == row["ms"] / row["bound_ms"]
        assert row["sms_for_collectives"] == 13 and row["reduced_ms"] > 0 and len(row["ms_rounds"]) == 2
        assert (row["whole_over_it"] == 1) or row["form"] != "whole"
    assert capsys.readouterr().out.count("passes, 4") >= 6


def test_a_form_with_other_bits_is_named(gpu, tmp_path, monkeypatch):
    from pipemoe.experts.hopper import HopperExperts

    def wrong(experts, layer, rows, out, scratch):
        gpu(experts, layer, rows, out, scratch)
        if len(rows) == 150:  # the first of two passes
            out[7, 3] += 1

    monkeypatch.setattr(HopperExperts, "__call__", wrong)
    with pytest.raises(ConfigError, match="passes, 2 on a: not the bits"):
        arrivals.run(options_of(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_a_gpu():
    with pytest.raises(ConfigError, match="Hopper"):
        arrivals.run(arrivals.parse([]))
