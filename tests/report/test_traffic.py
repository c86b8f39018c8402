"""What a report says of benchmarks/serve: medians over seeds, a campaign for each trace and arrival process."""

from __future__ import annotations

import json
import re

import pytest

from pipemoe.cli import main
from pipemoe.report.traffic import campaigns


def row(label, seed, load, p95, capacity=None, what="load", arrivals="trace"):
    return {
        "what": what,
        "label": label,
        "seed": seed,
        "load": load,
        "rate_rps": 10 * load,
        "trace": "azure",
        "arrivals": arrivals,
        "model": "small",
        "layers": 2,
        "num_ranks": 4,
        "requests": 100,
        "limits_ms": {"short": 50.0, "long": 400.0},
        "ttft_ms_p50": p95 / 2,
        "ttft_ms_p95": p95,
        "ttft_ms_p95_short": p95 / 4,
        "ttft_ms_p95_long": None,
        "queueing_ms_p50": 1.0,
        "tokens_per_s": 1000.0,
        "capacity_rps": capacity,
        "ttft_curve_ms": [p95 * percent / 100 for percent in range(101)],
    }


ROWS = [
    row("rolling", 0, 1.0, 80.0, what="saturation"),
    *(row("rolling", seed, load, 40 * load + seed, 12.0 + seed) for seed in range(3) for load in (0.5, 0.9)),
    row("lockstep 64", 0, 0.9, 200.0, 6.0),
    row("rolling", 0, 0.5, 30.0, arrivals="poisson"),
]


def test_medians_over_seeds():
    of_trace, of_poisson = campaigns(ROWS)
    assert (of_trace["name"], of_poisson["name"]) == ("azure, arrivals: trace", "azure, arrivals: poisson")
    assert "100 requests" in of_trace["facts"] and "short 50 ms, long 400 ms" in of_trace["facts"]
    assert [(line["label"], line["load"], line["ttft_ms_p95"]) for line in of_trace["lines"]] == [
        ("rolling", 0.5, 21.0),
        ("rolling", 0.9, 37.0),
        ("lockstep 64", 0.9, 200.0),
    ]
    assert of_trace["capacities"] == {"rolling": 13.0, "lockstep 64": 6.0}
    short, everything = of_trace["rates"]
    assert everything["series"][0]["points"] == [[5.0, 21.0], [9.0, 37.0]]
    assert short["series"][1] == {"label": "lockstep 64", "points": [[9.0, 50.0]]}
    assert [d["curve"][50] for d in of_trace["distributions"]] == [18.5, 100.0]
    assert of_poisson["capacities"] == {"rolling": None}


@pytest.fixture
def folder(tmp_path):
    machine = {"gpus": [{"name": "a GPU"}] * 2, "cpu": "a processor", "num_cores": 2}
    document = {"schema": "pipemoe.bench/1", "benchmark": "serve", "command": "benchmarks/serve", "commit": "1234"}
    (tmp_path / "serve.json").write_text(json.dumps(document | {"machine": machine, "rows": ROWS}))
    return tmp_path


def test_the_page_of_a_folder_of_serve(folder):
    assert main(["report", str(folder)]) == 0
    (data,) = re.findall(r'<script id="data" [^>]*>(.*?)</script>', (folder / "report.html").read_text(), re.DOTALL)
    found = json.loads(data)
    assert found["about"] == [{"facts": "2 x a GPU; commit 1234", "command": "benchmarks/serve"}]
    assert found["campaigns"] == campaigns(ROWS) and not found["workloads"]


def test_rows_that_lack_something_are_refused(folder, capsys):
    document = json.loads((folder / "serve.json").read_text())
    del document["rows"][2]["ttft_curve_ms"]
    (folder / "serve.json").write_text(json.dumps(document))
    assert main(["report", str(folder)]) == 2
    assert "serve.json: a row lacks what every row has (KeyError('ttft_curve_ms'))" in capsys.readouterr().err
