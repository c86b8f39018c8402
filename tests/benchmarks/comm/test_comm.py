"""The exchanges alone: right data, nccl-tests' columns, and data that are wrong are counted."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import results_schema
from benchmarks.comm import __main__ as comm
from benchmarks.comm.cases import EXCHANGES, Case, rank_rows, wave_of
from pipemoe.errors import ConfigError

SMALL = ["--device", "cpu", "--min-bytes", "1K", "--max-bytes", "64K", "--factor", "64", "--iterations", "1"]


@pytest.mark.mpi
def test_every_exchange_brings_the_right_data(world, tmp_path, capsys):
    options = comm.parse([*SMALL, "--json", str(tmp_path / "comm.json")])
    if world.shared is not None:
        with pytest.raises(ConfigError, match="ranks that share memory exchange nothing"):
            comm.run(world, options)
        return
    if world.size == 1:
        with pytest.raises(ConfigError, match="one rank has nobody to exchange with"):
            comm.run(world, options)
        return
    assert comm.run(world, options) == 0
    lines = capsys.readouterr().out.splitlines()
    if world.rank:
        assert not lines
        return
    assert lines[0].split() == ["exchange", "counts", "size", "count", "type", "time", "algbw", "busbw", "#wrong"]
    document = json.loads(lines[-1])
    results_schema.validate(document)
    assert document == results_schema.read_results(tmp_path / "comm.json")
    assert len(document["rows"]) == 5 * 2 * 2 == len(lines) - 2
    for row in document["rows"]:
        assert row["wrong"] == 0 and row["time_us"] > 0 and row["size"] == 256 * sum(row["rank_rows"])
        factor = (
            (world.size - 1) / world.size
            if row["exchange"] in ("all_gather", "reduce_scatter", "gather_combine")
            else 1
        )
        assert row["busbw_gbs"] == pytest.approx(factor * row["algbw_gbs"])


@pytest.mark.mpi
@pytest.mark.parametrize("name", EXCHANGES)
def test_wrong_data_are_counted(world, name):
    if world.size == 1 or world.shared is not None:
        pytest.skip("needs two ranks to exchange, over MPI or NCCL")
    combines = EXCHANGES[name].combine is not None
    case = Case(world, EXCHANGES[name], [2] * world.size, 4, torch.float32 if combines else torch.uint8)
    case.fill()
    nothing_came = 8 if combines else 8 * (world.size - 1)
    assert case.num_wrong() == nothing_came
    comm.LaneTimer(world).run(case, warm=False)
    assert case.num_wrong() == 0


def test_rows_are_dealt_equally_or_not():
    assert rank_rows(10, 4, "equal") == [2, 3, 2, 3]
    assert rank_rows(2590, 4, "skewed") == [2560, 10, 10, 10]
    assert rank_rows(4, 4, "skewed") == [3, 0, 0, 1]
    assert sum(rank_rows(12345, 7, "skewed")) == 12345


def test_padded_waves_have_blocks_of_the_longest():
    assert wave_of([3, 0, 1], padded=False).num_rows == 4
    wave = wave_of([3, 0, 1], padded=True)
    assert wave.num_rows == 9 and [(s.rank, s.row, s.num_rows) for s in wave.segments] == [(0, 0, 3), (2, 6, 1)]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--exchanges", "broadcast"], "choose from grouped_broadcast"),
        (["--counts", "odd"], "choose from equal, skewed"),
        (["--max-bytes", "1T"], "invalid num_bytes value: '1T'"),
        (["--factor", "1"], "--factor must be at least 2"),
        (["--row-bytes", "10"], "not a multiple of 4"),
    ],
)
def test_bad_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as refused:
        comm.parse(options)
    assert refused.value.code == 2 and message in capsys.readouterr().err


def test_sizes_are_read_as_nccl_tests_reads_them():
    assert [comm.num_bytes(text) for text in ("17", "1K", "256M", "2g")] == [17, 1024, 256 << 20, 2 << 30]
