"""The NCCL transport's calls against a stand-in library, without a GPU: what the plan projects, on the right memory."""

from types import SimpleNamespace

import pytest
import torch

from pipemoe.comm import nccl
from pipemoe.comm.nccl import NcclTransport
from pipemoe.comm.transport import WaveSums
from pipemoe.plan.planner import plan
from pipemoe.plan.projection import project
from pipemoe.plan.schedule import Facts, ModelShape, PlanConfig, Segment, Wave

WIDTH, TOKENS = 8, (3, 0, 2)


class Communicator:
    """Keeps (name of the call, its arguments)."""

    def __init__(self, size, unique_id, rank):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))


@pytest.fixture
def transports(monkeypatch):
    """One per rank."""
    names = ("UINT8", "FLOAT32", "FLOAT64", "FLOAT16", "BFLOAT16", "SUM")
    library = SimpleNamespace(NcclCommunicator=Communicator, groupStart=lambda: None, groupEnd=lambda: None, **{f"NCCL_{name}": name for name in names})
    monkeypatch.setattr(nccl, "library", lambda: library)
    monkeypatch.setattr(nccl, "_current_stream", lambda: "stream")
    return [NcclTransport(rank, len(TOKENS), [b"dispatch", b"combine"]) for rank in range(len(TOKENS))]


@pytest.mark.parametrize(("mode", "combine"), [("broadcast", "reduce"), ("broadcast", "gather"), ("padded", "reduce"), ("padded", "gather")])
def test_the_log_is_what_the_plan_projects(transports, mode, combine):
    p = plan(Facts(tuple((n,) if n else () for n in TOKENS)), ModelShape(WIDTH, 16, 4, 2, 1), PlanConfig(mode=mode, combine=combine))
    wave = p.cohorts[0].waves[0]
    for rank, transport in enumerate(transports):
        transport.log = []
        results = [torch.zeros(s.num_rows, WIDTH) for s in wave.segments if s.rank == rank]
        sums = WaveSums(torch.zeros(wave.num_rows, WIDTH), results, torch.zeros(len(TOKENS) - 1, wave.num_rows, WIDTH))
        transport.dispatch(0, 0, wave, p.exchange(wave), torch.zeros(wave.num_rows, WIDTH, dtype=torch.uint8))
        transport.combine(0, 0, wave, p.exchange(wave), combine, sums)
        assert transport.log == project(p, rank, WIDTH, 4)


def test_a_gather_reads_own_sums_and_fills_the_staging(transports):
    """Rank 2 owns two segments; what is staged for each peer are the rows of both, in that order."""
    wave = Wave((Segment(0, 0, 4, 0), Segment(2, 0, 2, 4), Segment(2, 2, 3, 6)), 7)
    partial, staging = torch.ones(7, WIDTH), torch.ones(2, 5, WIDTH)
    results = [torch.zeros(2, WIDTH), torch.zeros(1, WIDTH)]
    transports[2].combine(0, 0, wave, "broadcast", "gather", WaveSums(partial, results, staging))
    row_bytes = 4 * WIDTH
    assert transports[2]._combine[0].calls == [
        ("send", partial[0].data_ptr(), 4 * row_bytes, "UINT8", 0, "stream"),
        ("recv", staging[0, 0].data_ptr(), 2 * row_bytes, "UINT8", 0, "stream"),
        ("recv", staging[1, 0].data_ptr(), 2 * row_bytes, "UINT8", 1, "stream"),
        ("recv", staging[0, 2].data_ptr(), row_bytes, "UINT8", 0, "stream"),
        ("recv", staging[1, 2].data_ptr(), row_bytes, "UINT8", 1, "stream"),
    ]
    assert all(bool((result == 3).all()) for result in results)  # own and two peers'
