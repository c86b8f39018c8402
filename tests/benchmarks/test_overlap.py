"""The overlap benchmark: every pair gets a row, and its figures follow from its times."""

from __future__ import annotations

import json

import pytest

from benchmarks import overlap, results_schema
from pipemoe.contention import MAX_REPEATS, PairTimes
from pipemoe.errors import ConfigError

SMALL = ["--device", "cpu", "--tokens", "5", "--target-ms", "1", "--rounds", "1"]


@pytest.mark.mpi
def test_every_pair_gets_a_row(world, tmp_path, capsys):
    options = overlap.parse([*SMALL, "--json", str(tmp_path / "overlap.json")])
    if world.device.type != "cpu":
        pytest.skip("asks for the host")
    if world.size == 1:
        with pytest.raises(ConfigError, match="nothing to overlap"):
            overlap.run(world, options)
        return
    assert overlap.run(world, options) == 0
    lines = capsys.readouterr().out.splitlines()
    if world.rank:
        assert not lines
        return
    document = json.loads(lines[-1])
    assert document == results_schema.read_results(tmp_path / "overlap.json")
    assert [(row["a"], row["b"]) for row in document["rows"]] == list(overlap.PAIRS) and len(lines) == len(
        overlap.PAIRS
    ) + 2
    for row in document["rows"]:
        assert row["a_slowdown"] == pytest.approx(row["a_together_ms"] / row["a_alone_ms"])
        assert row["gain"] == pytest.approx((row["a_alone_ms"] + row["b_alone_ms"]) / row["both_together_ms"])
        assert row["both_together_ms"] >= 0.99 * max(row["a_together_ms"], row["b_together_ms"])
        communicates = {row["a"], row["b"]} & set(overlap.COMMUNICATION)
        assert (row["overlap_pct"] is None) == (not communicates)
        assert all(0 < row[f"{side}_repeats"] <= MAX_REPEATS for side in "ab")


def test_speeds_of_either_side():
    """A takes 10 s alone, B 8; together A ends after 12 and B, which went on at half its speed until then, after 14."""
    times = PairTimes((1, 1), (10.0, 8.0), (12.0, 14.0), 14.0)
    assert times.speeds() == pytest.approx((10 / 12, 0.5)) and times.gain == pytest.approx(18 / 14)
    assert PairTimes((1, 1), (8.0, 10.0), (14.0, 12.0), 14.0).speeds() == pytest.approx((0.5, 10 / 12))
    assert PairTimes((1, 1), (5.0, 5.0), (5.0, 10.0), 10.0).speeds() == (1.0, 0.0)
