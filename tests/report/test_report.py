"""`pipemoe report`: the figures and spans that the page holds, and what a browser makes of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from contextlib import contextmanager

import pytest

from pipemoe.cli import main
from pipemoe.plan.schedule import Op, OpKind
from pipemoe.report.command import report_page, timeline_lanes
from pipemoe.trace import Span, Timeline, chrome_trace
from tests.report.test_traffic import ROWS

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def row(mode, rank_tokens, mean, ttfts):
    return {
        "mode": mode,
        "model": "small",
        "layers": 2,
        "num_ranks": 2,
        "rank_tokens": rank_tokens,
        "mean_ttft_ms": mean,
        "p50_ttft_ms": mean,
        "p90_ttft_ms": mean,
        "p99_ttft_ms": mean,
        "ttft_ms_median_rank": mean,
        "ttft_ms_slowest_rank": mean,
        "exposed_comm_ms": None,
        "peak_workspace_bytes": 3 * 2**20,
        "parity": True,
        "ttfts": ttfts,
    }


def trace_of(offset):
    """Two ranks; on each an attend of 100 us, a dispatch of 50, and experts of 150, one after another."""
    timelines = [
        Timeline(
            [
                Span(Op(OpKind.ATTEND, 0, 0, 0), offset, offset + 100e-6),
                Span(Op(OpKind.DISPATCH, 0, 0, 0), offset + 100e-6, offset + 150e-6),
                Span(Op(OpKind.EXPERTS, 0, 0, 0), offset + 150e-6, offset + 300e-6),
            ]
        )
        for _ in range(2)
    ]
    return chrome_trace(timelines)


@pytest.fixture
def folder(tmp_path):
    rows = [row("padded", [40, 7], 91.25, [0.09, 0.0925]), row("auto", [40, 7], 47.5, [0.08, 0.015])]
    rows.append(row("auto", "a_</script>_trace", 1234.5, [1.0]))
    machine = {"gpus": [], "cpu": "a processor", "num_cores": 2}
    document = {"schema": "pipemoe.bench/1", "benchmark": "ttft", "command": "launch/mpirun.sh -n 2 benchmarks/ttft"}
    (tmp_path / "ttft.json").write_text(json.dumps(document | {"commit": None, "machine": machine, "rows": rows}))
    for mode in ("padded", "auto"):
        (tmp_path / f"timeline_40_7_{mode}.json").write_text(json.dumps(trace_of(5.0)))
    return tmp_path


def test_a_page_holds_all_figures_and_needs_nothing_else(folder, capsys):
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
    page = (folder / "report.html").read_text()
    assert not re.search(r"(?:src|href)\s*=|@import|fetch\(|url\(", page)
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    found = json.loads(data)
    assert [w["name"] for w in found["workloads"]] == ["tokens per rank: 40, 7", "a_</script>_trace"]
    assert [r["mean_ttft_ms"] for w in found["workloads"] for r in w["rows"]] == [91.25, 47.5, 1234.5]
    assert sorted(found["workloads"][0]["timelines"]) == ["auto", "padded"] and not found["workloads"][1]["timelines"]


@pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium with its driver")
def test_a_browser_draws_the_policies_of_a_service(tmp_path):
    document = {"schema": "pipemoe.bench/1", "benchmark": "serve", "command": "benchmarks/serve", "commit": None}
    machine = {"gpus": [], "cpu": "a processor", "num_cores": 2}
    (tmp_path / "serve.json").write_text(json.dumps(document | {"machine": machine, "rows": ROWS}))
    (tmp_path / "report.html").write_text(report_page(tmp_path))
    with browser() as call:
        call("POST", "/url", {"url": (tmp_path / "report.html").as_uri()})

        def run(script):
            return call("POST", "/execute/sync", {"script": script, "args": []})

        cells = run(
            "return [...document.querySelectorAll('table')[0].rows].map(r => [...r.cells].map(c => c.textContent))"
        )
        assert cells[1][:4] == ["rolling", "0.50", "5.0", "10.5"] and cells[3][-1] == "6.0"
        dots = (
            "return [...document.querySelectorAll('svg')[1].querySelectorAll('circle')].map(c => +c.getAttribute('cx'))"
        )
        left, middle, right = run(dots)  # rolling at 5 and 9 requests a second, lockstep at 9; the axis ends at 13
        assert middle == right and (middle - 70) / (left - 70) == pytest.approx(9 / 5)
        marks = "return document.querySelectorAll('svg')[1].querySelectorAll('[stroke-dasharray]').length"
        assert run(marks) == 2 and run("return document.querySelectorAll('svg').length") == 6


def test_lanes_and_spans_of_a_timeline():
    found = timeline_lanes(trace_of(7.0))
    assert found["lanes"] == [f"rank {rank} cohort 0 {lane}" for rank in (0, 1) for lane in ("compute", "dispatch")]
    assert sorted(found["spans"])[:3] == [
        [0, 0, 0, 0, 0, 0.0, 100.0],
        [0, 2, 0, 0, 0, 150.0, 150.0],
        [1, 1, 0, 0, 0, 100.0, 50.0],
    ]
    assert timeline_lanes(chrome_trace([])) == {"lanes": [], "spans": []}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "not the results"),
        ('{"schema": "pipemoe.bench/1", "benchmark": "comm"}', "not the results of benchmarks/ttft"),
        ('{"schema": "pipemoe.bench/1", "benchmark": "ttft", "rows": [{}]}', "lacks what every row has"),
    ],
)
def test_a_folder_without_results_is_refused(tmp_path, capsys, text, wrong):
    if text is not None:
        (tmp_path / "ttft.json").write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"pipemoe report: {tmp_path / 'ttft.json'}: ") and wrong in said
    assert not (tmp_path / "report.html").exists()


@contextmanager
def browser():
    """call(method, path, value) of a headless browser's WebDriver session."""
    driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        port = next(found[1] for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line)))

        def call(method, path, value=None):
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/session{path}",
                None if value is None else json.dumps(value).encode(),
                {"Content-Type": "application/json"},
                method=method,
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]

        options = {"binary": BROWSER, "args": ["--headless=new", "--no-sandbox", "--window-size=1200,1400"]}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        session = "/" + call("POST", "", wanted)["sessionId"]
        yield lambda method, path, value=None: call(method, session + path, value)
        call("DELETE", session)
    finally:
        driver.kill()
        driver.wait()


@pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium with its driver")
def test_a_browser_shows_the_figures_and_names_a_span_under_the_pointer(folder):
    page = folder / "report.html"
    page.write_text(report_page(folder))
    with browser() as call:
        call("POST", "/url", {"url": page.as_uri()})

        def run(script, *arguments):
            return call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

        cells = run(
            "const texts = row => [...row.cells].map(cell => cell.textContent);"
            "return [...document.querySelectorAll('table')].map(table => [...table.rows].map(texts));"
        )
        assert [line[:2] for line in cells[0]] == [["mode", "mean ms"], ["padded", "91.3"], ["auto", "47.5"]]
        assert cells[1][1][:2] == ["auto", "1235"] or cells[1][1][:2] == ["auto", "1234"]
        assert run("return document.querySelector('td.best').textContent") == "47.5"
        assert run("return [...document.querySelectorAll('select')].map(s => s.value)") == ["padded", "auto"]
        point = """
            const canvas = document.querySelectorAll('canvas')[1], box = canvas.getBoundingClientRect();
            const x = box.left + 170 + (box.width - 170) * arguments[0], y = box.top + 20 + 13 * arguments[1] + 6;
            canvas.dispatchEvent(new PointerEvent('pointermove', {clientX: x, clientY: y}));
            const tip = document.getElementById('tip');
            return tip.style.display === 'none' ? null : tip.textContent;
        """
        assert run(point, 200 / 300, 0).startswith(
            "experts  rank 0, cohort 0, layer 0, wave 0\n150.0 µs, from 150.0 to 300.0"
        )
        assert run(point, 120 / 300, 3).startswith("dispatch  rank 1, cohort 0")
        assert run(point, 20 / 300, 3) is None
        zoom = """
            const canvas = document.querySelectorAll('canvas')[0], box = canvas.getBoundingClientRect();
            const x = box.left + 170 + (box.width - 170) * arguments[0];
            const turn = {clientX: x, clientY: box.top + 30, deltaY: -1};
            for (let i = 0; i < 10; i++) canvas.dispatchEvent(new WheelEvent('wheel', turn));
        """
        run(zoom, 0.5)  # both timelines: around 150 us the middle stays, the edges come from near it
        assert run(point, 0.45, 0) is None and run(point, 0.55, 0).startswith("experts")
        assert run(point, 0.05, 1).startswith("dispatch")
