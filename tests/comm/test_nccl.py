"""The NCCL transport without a GPU, against a stand-in that does what it is told: every form, root and slot."""

import pytest
import torch

from pipemoe.comm import nccl
from pipemoe.comm.nccl import NcclTransport
from pipemoe.comm.transport import WaveSums
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.planner import plan
from pipemoe.plan.projection import project
from pipemoe.plan.schedule import Facts, ModelShape, Segment, Wave
from tests.comm.nccl_stand_in import STREAM, Communicator, StandIn
from tests.comm.wave_cases import broadcast_waves, padded_wave

WIDTH, NUM_RANKS = 48, 4
COMMUNICATORS = [b"dispatch 0", b"combine 0", b"dispatch 1", b"combine 1"]
WAVES = {("broadcast", name): wave for name, wave in broadcast_waves(NUM_RANKS).items()} | {
    ("padded", "a block each"): padded_wave(NUM_RANKS)
}


@pytest.fixture
def stand_in():
    return StandIn(NUM_RANKS)


@pytest.fixture
def transports(stand_in, monkeypatch):
    """One per rank."""
    monkeypatch.setattr(nccl, "_current_stream", lambda: STREAM)
    made = []
    for rank, library in enumerate(stand_in.libraries):
        monkeypatch.setattr(nccl, "library", lambda library=library: library)
        made.append(NcclTransport(rank, NUM_RANKS, COMMUNICATORS))
    return made


def rows_of(rank, start, stop):
    """What rank `rank` sends of its tokens: bytes that name rank, token and column."""
    at = torch.arange(start, stop).unsqueeze(1) * 7 + torch.arange(WIDTH) * 3 + rank * 31
    return (at % 251).to(torch.uint8)


def calls_of(stand_in):
    """Name and communicator of each call of rank 0, group by group; other ranks differ in sends and receives alone."""
    return [[(c.name, c.communicator) for c in group] for group in stand_in.libraries[0].groups]


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize(("exchange", "name"), WAVES, ids=str)
def test_dispatch_brings_every_row_to_every_rank(stand_in, transports, exchange, name, slot):
    wave = WAVES[exchange, name]
    wanted = torch.full((wave.num_rows, WIDTH), 255, dtype=torch.uint8)
    buffers = [wanted.clone() for _ in range(NUM_RANKS)]
    for s in wave.segments:
        wanted[s.row : s.row + s.num_rows] = buffers[s.rank][s.row : s.row + s.num_rows] = rows_of(*s[:3])
    stand_in.memory = [[buffer] for buffer in buffers]
    stand_in.on_every_rank(lambda rank: transports[rank].dispatch(slot, 0, wave, exchange, buffers[rank]))
    assert all(torch.equal(buffer, wanted) for buffer in buffers)
    call = ("allGather" if exchange == "padded" else "bcast", b"dispatch %d" % slot)
    assert calls_of(stand_in) == [[call] * (1 if exchange == "padded" else len(wave.segments))]  # one group


@pytest.mark.parametrize("combine", ["reduce", "gather"])
@pytest.mark.parametrize(("exchange", "name"), WAVES, ids=str)
def test_combine_sums_every_ranks_part_at_the_owner(stand_in, transports, exchange, name, combine):
    wave, slot = WAVES[exchange, name], 1
    own = [[s for s in wave.segments if s.rank == rank] for rank in range(NUM_RANKS)]
    values = (torch.arange(wave.num_rows).unsqueeze(1) * 5 + torch.arange(WIDTH)).remainder(31).float() + 1
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        memory = [(values * (rank + 1)).to(dtype) for rank in range(NUM_RANKS)]
        before = [m.clone() for m in memory]
        staged = [torch.full((NUM_RANKS - 1, wave.num_rows, WIDTH), torch.nan, dtype=dtype) for _ in own]
        kind = torch.float32 if combine == "gather" else dtype
        results = [[torch.full((s.num_rows, WIDTH), torch.nan, dtype=kind) for s in o] for o in own]
        stand_in.memory = [[m, g, *r] for m, g, r in zip(memory, staged, results)]

        def work(rank):
            sums = WaveSums(memory[rank], results[rank], staged[rank])
            transports[rank].combine(slot, 0, wave, exchange, combine, sums)

        stand_in.on_every_rank(work)
        for segments, of_rank in zip(own, results):
            for s, result in zip(segments, of_rank, strict=True):
                assert torch.equal(result.float(), values[s.row : s.row + s.num_rows] * 10), (s, dtype)  # 1 + 2 + 3 + 4
        for rank, (now, then) in enumerate(zip(memory, before)):  # sums may be left in the place of own rows alone
            others = torch.ones(wave.num_rows, dtype=torch.bool)
            size = wave.num_rows // NUM_RANKS
            block = [(rank * size, size)] if exchange == "padded" else []
            for row, num_rows in [(s.row, s.num_rows) for s in own[rank]] + block:
                others[row : row + num_rows] = False
            assert torch.equal(now[others], then[others])
    groups = calls_of(stand_in)
    assert len(groups) == 4 and {c for group in groups for _, c in group} == {b"combine 1"}
    if combine == "reduce":
        names = ["reduceScatter"] if exchange == "padded" else ["reduce"] * len(wave.segments)
        assert [[name for name, _ in group] for group in groups] == [names] * len(groups)


@pytest.mark.parametrize(
    ("mode", "combine"), [("broadcast", "reduce"), ("broadcast", "gather"), ("padded", "reduce"), ("padded", "gather")]
)
def test_the_log_is_what_the_plan_projects(stand_in, transports, mode, combine):
    tokens = (3, 0, 2, 4)
    p = plan(
        Facts(tuple((n,) if n else () for n in tokens)),
        ModelShape(WIDTH, 16, 4, 2, 1),
        PlanConfig(mode=mode, combine=combine, max_tokens_per_rank=100),
    )
    wave = p.cohorts[0].waves[0]

    def work(rank):
        transports[rank].log = []
        rows = torch.zeros(wave.num_rows, WIDTH, dtype=torch.uint8)
        results = [torch.zeros(s.num_rows, WIDTH) for s in wave.segments if s.rank == rank]
        sums = WaveSums(torch.zeros(wave.num_rows, WIDTH), results, torch.zeros(NUM_RANKS - 1, wave.num_rows, WIDTH))
        stand_in.memory[rank] = [rows, sums.partial, sums.staging, *results]
        transports[rank].dispatch(0, 0, wave, p.exchange(wave), rows)
        transports[rank].combine(0, 0, wave, p.exchange(wave), combine, sums)
        return transports[rank].log

    assert stand_in.on_every_rank(work) == [project(p, rank, WIDTH, 4) for rank in range(NUM_RANKS)]


def test_a_gather_reads_own_sums_and_fills_the_staging(stand_in, transports):
    """Rank 2 owns two segments; what is staged for each peer are the rows of both, in that order."""
    wave = Wave((Segment(0, 0, 4, 0), Segment(2, 0, 2, 4), Segment(2, 2, 3, 6)), 7)
    sums = []
    for rank in range(NUM_RANKS):
        results = [torch.zeros(s.num_rows, WIDTH) for s in wave.segments if s.rank == rank]
        sums.append(WaveSums(torch.ones(7, WIDTH), results, torch.zeros(3, 5, WIDTH)))
        stand_in.memory[rank] = [sums[rank].partial, sums[rank].staging, *results]
    stand_in.on_every_rank(lambda rank: transports[rank].combine(0, 0, wave, "broadcast", "gather", sums[rank]))
    partial, staging, row_bytes = sums[2].partial, sums[2].staging, 4 * WIDTH
    (group,) = stand_in.libraries[2].groups
    assert [(c.name, c.send or c.receive, c.count, c.kind, c.peer) for c in group] == [
        ("send", partial[0].data_ptr(), 4 * row_bytes, "UINT8", 0),
        ("recv", staging[0, 0].data_ptr(), 2 * row_bytes, "UINT8", 0),
        ("recv", staging[1, 0].data_ptr(), 2 * row_bytes, "UINT8", 1),
        ("recv", staging[2, 0].data_ptr(), 2 * row_bytes, "UINT8", 3),
        ("recv", staging[0, 2].data_ptr(), row_bytes, "UINT8", 0),
        ("recv", staging[1, 2].data_ptr(), row_bytes, "UINT8", 1),
        ("recv", staging[2, 2].data_ptr(), row_bytes, "UINT8", 3),
    ]
    assert all(bool((result == 4).all()) for result in sums[2].results)  # own and three peers'


@pytest.mark.parametrize("end", ["abort", "close"])
def test_every_communicator_is_aborted(stand_in, transports, end):
    """close as well: NCCL's destroy is collective."""
    getattr(transports[1], end)()
    assert stand_in.aborted == [(1, name) for name in COMMUNICATORS]


def test_every_communicator_is_asked_for_errors(stand_in, transports):
    transports[2].check()
    assert stand_in.checked == [(2, name) for name in COMMUNICATORS] and not stand_in.aborted


def test_what_the_library_noticed_is_raised(stand_in, transports, monkeypatch):
    def broken(communicator):
        raise OSError("network")

    monkeypatch.setattr(Communicator, "check_async_error", broken)
    with pytest.raises(OSError, match="network"):
        transports[0].check()
