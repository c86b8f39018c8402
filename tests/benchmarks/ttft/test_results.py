"""From requests served to row, table, picture and page."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import readme_table, results_schema
from benchmarks.ttft.plot import plot_ttft
from benchmarks.ttft.row import ServedRequest, ttft_row
from benchmarks.ttft.table import ttft_table
from pipemoe.errors import InputError


def row(mode: str = "per_rank", **changes):
    served = [ServedRequest(rank=i % 3, input_tokens=10 + i, ttft_s=0.001 * (i + 1)) for i in range(10)]
    facts = {
        "mode": mode,
        "model": "qwen3",
        "layers": 8,
        "num_ranks": 4,  # rank 3 has no requests
        "rank_tokens": [4096, 16, 16, 0],
        "requests": served,
        "duration_s": 0.5,
        "exposed_comm_ms": 1.25,
        "overlap_pct": None,
        "peak_workspace_bytes": 3 << 20,
        "parity": True,
    }
    return ttft_row(**{**facts, **changes})


def test_row_follows_the_schema_and_vllms_names():
    found = row()
    results_schema.results_document("ttft", [found])
    ttft_ms = np.arange(1, 11)
    assert found["mean_ttft_ms"] == pytest.approx(5.5)
    assert found["median_ttft_ms"] == found["ttft_ms_p50"] == pytest.approx(5.5)
    assert found["p90_ttft_ms"] == pytest.approx(np.percentile(ttft_ms, 90))
    assert found["p99_ttft_ms"] == found["ttft_ms_p99"] == pytest.approx(np.percentile(ttft_ms, 99))
    assert found["std_ttft_ms"] == pytest.approx(ttft_ms.std())
    # Ranks 0, 1, 2 have (1, 4, 7, 10), (2, 5, 8) and (3, 6, 9) ms, all in one step.
    assert found["ttft_ms_slowest_rank"] == pytest.approx(10)
    assert found["ttft_ms_median_rank"] == pytest.approx(9)
    assert found["completed"] == 10
    assert found["total_input_tokens"] == sum(range(10, 20))
    assert found["request_throughput"] == pytest.approx(20)
    assert found["ttfts"][1] == pytest.approx(0.002)
    assert found["input_lens"][:2] == [10, 11] and found["ranks"][:4] == [0, 1, 2, 0]


def test_figures_over_ranks_are_taken_per_step():
    # rank 2 idle in step 1
    served = [(0, 0.010, 0), (1, 0.002, 0), (2, 0.003, 0), (0, 0.001, 1), (1, 0.004, 1), (1, 0.006, 1)]
    found = row(requests=[ServedRequest(rank, 7, ttft_s, step) for rank, ttft_s, step in served])
    assert found["ttft_ms_slowest_rank"] == pytest.approx((10 + 6) / 2)
    assert found["ttft_ms_median_rank"] == pytest.approx((3 + 3.5) / 2)


def test_row_without_requests_is_refused():
    with pytest.raises(InputError, match="mode padded: no request"):
        row("padded", requests=[])


def test_table_is_aligned_and_says_what_is_unknown():
    lines = ttft_table([row(), row("padded", parity=False)]).splitlines()
    assert lines[0] == "model qwen3, layers 8, ranks 4, tokens per rank 4096, 16 x 2, 0"
    assert lines[1].split()[:4] == ["mode", "TTFT", "mean", "ms"]
    assert lines[2].split() == ["per_rank", "5.5", "5.5", "9.1", "9.9", "9.0", "10.0", "1.2", "-", "3.0", "yes"]
    assert lines[3].split()[0] == "padded" and lines[3].split()[-1] == "NO"
    assert len({len(line) for line in lines[1:]}) == 1


def test_what_differs_becomes_a_column():
    lines = ttft_table([row(), row(rank_tokens="azure2023_conv")]).splitlines()
    assert lines[0] == "model qwen3, layers 8, ranks 4"
    assert lines[1].startswith("tokens per rank")
    assert lines[3].startswith("azure2023_conv")


def test_plot_writes_a_png(tmp_path):
    path = tmp_path / "new" / "ttft.png"
    plot_ttft([row(), row("padded")], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="nothing to plot"):
        plot_ttft([{"mode": "padded"}], path)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page that marks the results of a ttft run."""
    monkeypatch.setattr(readme_table, "_CHECKOUT", tmp_path)
    document = results_schema.results_document("ttft", [row(), row("padded")])
    results_schema.write_results(document, tmp_path / "results" / "ttft.json")
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- results: results/ttft.json -->\nold\n<!-- end of results -->\nafter\n")
    return page


def test_page_gets_the_table_once_and_for_all(page):
    assert readme_table.main(["--check", str(page)]) == 1
    assert "\nold\n" in page.read_text()
    assert readme_table.main([str(page)]) == 0
    text = page.read_text()
    assert "\nold\n" not in text and text.startswith("before\n") and text.endswith("<!-- end of results -->\nafter\n")
    assert "| per_rank | 5.5 |" in text
    assert "| --- | ---: |" in text
    assert readme_table.main(["--check", str(page)]) == 0
    assert readme_table.main([str(page)]) == 0
    assert page.read_text() == text


def test_page_gets_verdicts_and_leaves_drawn_steps_to_them(page):
    rounds = {f"{odd}_{name}": 4.0 for odd in ("odd", "even") for name in ("mean_ttft_ms", "slowest_rank_ms")}
    rows = [{**row(mode), **rounds, "makespan_budget": 0.1} for mode in ("broadcast", "auto")]
    rows += [{**r, "rank_tokens": [1, 2, 3], "trace": "t"} for r in rows]
    results_schema.write_results(results_schema.results_document("ttft", rows), page.parent / "results" / "ttft.json")
    page.write_text(page.read_text() + page.read_text().replace("results:", "verdicts:"))
    assert readme_table.main([str(page)]) == 0
    results, verdicts = page.read_text().split("<!-- verdicts:")
    assert (
        "1, 2, 3" not in results
        and "| 1, 2, 3 | broadcast | 1.000 | - | 1.000 |" in verdicts
        and "geometric mean of draws" in verdicts
    )


def test_page_without_marks_is_refused(page):
    page.write_text("nothing here\n")
    with pytest.raises(InputError, match="has no line <!-- results"):
        readme_table.main([str(page)])


def test_other_benchmarks_show_their_plain_fields():
    document = results_schema.results_document("comm", [{"size": 1, "times": [1, 2], "busbw": None}])
    lines = readme_table.markdown_table(document).splitlines()
    assert lines[:3] == ["| size | busbw |", "| ---: | ---: |", "| 1 | - |"]
