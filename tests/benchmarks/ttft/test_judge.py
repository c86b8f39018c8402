"""Figures over rounds, and who is ahead of whom."""

from __future__ import annotations

import pytest

from benchmarks.ttft import judge as ttft_judge
from benchmarks.ttft.measure import figures_over_rounds, segments_seconds
from pipemoe.errors import InputError


def row(mode, mean, slowest, *, odd_mean=None, tokens=(4, 4), **more):
    figures = {
        "mean_ttft_ms": mean,
        "ttft_ms_slowest_rank": slowest,
        "ttft_ms_median_rank": mean,
        "makespan_budget": 0.1,
    }
    figures |= {
        "odd_mean_ttft_ms": odd_mean or mean,
        "even_mean_ttft_ms": mean,
        "odd_slowest_rank_ms": slowest,
        "even_slowest_rank_ms": slowest,
    }
    return {"mode": mode, "rank_tokens": list(tokens), **figures, **more}


def test_figures_over_rounds():
    """One step; rank 0 has two prompts, rank 1 none, rank 2 one; three rounds."""
    seconds = [[[[1.0, 2.0], [3.0, 4.0], [1.0, 4.0]], [[], [], []], [[6.0], [8.0], [10.0]]]]
    found = figures_over_rounds(seconds)
    assert found["least_mean_ttft"] == 3.0 and found["most_mean_ttft"] == 5.0
    assert found["odd_mean_ttft"] == pytest.approx((1 + 3 + 8) / 3) and found["odd_slowest_rank"] == 8.0
    assert found["even_mean_ttft"] == pytest.approx((3 + 4 + 8) / 3) and found["even_slowest_rank"] == 8.0
    assert set(figures_over_rounds([[[[1.0]]]])) == {"least_mean_ttft", "most_mean_ttft"}


def test_segments_add_up_computation_of_the_slowest_transfers_of_the_last_to_come():
    attend, dispatch = [0, 0, 3, 0], [1, 0, 3, 0]
    rows = [[[*attend, 0.0, 2.0], [*dispatch, 2.0, 6.0]], [[*attend, 0.0, 3.0], [*dispatch, 5.0, 6.0]]]
    assert segments_seconds(rows) == pytest.approx(3.0 + 1.0)


def test_the_best_fixed_mode_is_picked_on_odd_rounds_within_the_budget():
    modes = {
        "padded": row("padded", 10.0, 10.0),
        "per_rank": row("per_rank", 5.0, 20.0),
        "chunked": row("chunked", 9.0, 10.5, odd_mean=9.5),
    }
    modes["auto"] = row("auto", 8.0, 10.5)
    assert ttft_judge.best_fixed(modes) == "chunked"  # per_rank ends too late
    found = ttft_judge.verdict(modes)
    assert found["mean_over_best"] == pytest.approx(8 / 9) and found["mean_over_padded"] == pytest.approx(0.8)
    assert found["mean_over_lockstep"] is None


def test_front_leaves_out_what_is_beaten():
    rows = [row("auto", 5.0, 9.0), row("auto 0 %", 6.0, 8.0), row("auto 5 %", 7.0, 8.5), row("broadcast", 1.0, 1.0)]
    assert [r["mode"] for r in ttft_judge.front(rows)] == ["auto 0 %", "auto"]


def test_judgement_as_text():
    rows = [row("broadcast", 9.0, 10.0), row("auto", 4.5, 9.0, predicted_ttft_ms=9.9, predicted_median_rank_ms=4.5)]
    rows += [row("broadcast", 8.0, 10.0, tokens=(1, 2), trace="t"), row("auto", 6.0, 9.0, tokens=(1, 2), trace="t")]
    text = ttft_judge.judgement(rows)
    assert "0.500" in text and "geometric mean of draws" in text and "0.750" in text
    assert "median error 5.0 %, largest 10.0 %" in text and "+10 %" in text and "+0 %" in text
    with pytest.raises(InputError, match="row 0: no even rounds"):
        ttft_judge.judgement([{"mode": "auto", "rank_tokens": [1]}])
