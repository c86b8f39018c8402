"""benchmarks/arrivals.py as far as it goes without a GPU."""

import json

import pytest
import torch

from benchmarks import arrivals
from benchmarks.delayed_wave import forms_of, list_schedule, split
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_a_gpu():
    with pytest.raises(ConfigError, match="Hopper"):
        arrivals.run(arrivals.parse([]))
