"""benchmarks/arrivals.py as far as it goes without a GPU."""

import json

import pytest
import torch

from benchmarks import arrivals
from pipemoe.errors import ConfigError


def test_segments_are_all_rows():
    assert arrivals.split(4096, 4) == [1024] * 4
    assert arrivals.split(10, 4) == [2, 3, 2, 3] and arrivals.split(2, 3) == [0, 1, 1]


def test_options():
    options = arrivals.parse(["--cases", "deepseek-v3:100,qwen3-30b-a3b:7", "--groups", "1,3", "--latencies", "0,9.5"])
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
    assert arrivals.list_schedule(tiles, (1.0, 0.25), 2) == 2.25  # the second row tile ends last
    assert arrivals.list_schedule(tiles, (1.0, 0.25), 4) == 1.75
    assert arrivals.list_schedule([(3.0, (1, 1))], (1.0, 0.25), 2) == 4.25
    assert arrivals.list_schedule(tiles, (1.0, 0.25), 1) == 4.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_a_gpu():
    with pytest.raises(ConfigError, match="Hopper"):
        arrivals.run(arrivals.parse([]))
