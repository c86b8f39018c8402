"""The transports over the ranks of a world: every collective, in each form, on every slot, with counts that skew."""

import pytest
import torch

from pipemoe.comm.transport import WaveSums
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.planner import plan
from pipemoe.plan.projection import project
from pipemoe.plan.schedule import Facts, ModelShape, OpKind
from tests.comm.wave_cases import broadcast_waves, padded_wave

pytestmark = pytest.mark.mpi


@pytest.fixture(autouse=True)
def needs_collectives(world):
    if world.shared is not None:
        pytest.skip("of MPI's and NCCL's transport; PIPEMOE_HOST_TRANSPORT=mpi has one")


WIDTH = 128
COUNTS = ((3, 0, 17, 1), (1, 1, 1, 1), (0, 0, 0, 9), (5, 1000, 2, 0))


def on_lane(world, lane, work):
    """Run `work` in a lane from the conductor's thread, as a run does, and wait for it."""

    def task():
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        event = lane.submit(work)

        def done():
            lane.poll()
            return event.done()

        world.conductor.wait(done, "transport test", needs_all=True)

    world.conductor.call(task)


def wave_of(world, counts, exchange):
    counts = [counts[rank % len(counts)] for rank in range(world.size)]
    if not any(counts):
        return None
    config = PlanConfig(mode="padded" if exchange == "padded" else "broadcast")
    p = plan(Facts(tuple((n,) if n else () for n in counts)), ModelShape(WIDTH, 16, 4, 2, 1), config)
    return p, p.cohorts[0].waves[0]


def rows_of(rank, n, device):
    """What rank `rank` sends: bytes that name rank, row and column."""
    at = torch.arange(n, device=device).unsqueeze(1) * 7 + torch.arange(WIDTH, device=device) * 3 + rank * 31
    return (at % 251).to(torch.uint8)


@pytest.mark.parametrize("exchange", ["broadcast", "padded"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_dispatch_brings_every_row_to_every_rank(world, exchange, counts):
    made = wave_of(world, counts, exchange)
    if made is None:
        pytest.skip("no rows on these ranks")
    _, wave = made
    for slot in range(world.num_slots):
        buffer = torch.full((wave.num_rows, WIDTH), 255, dtype=torch.uint8, device=world.device)
        for s in wave.segments:
            if s.rank == world.rank:
                buffer[s.row : s.row + s.num_rows] = rows_of(s.rank, s.num_rows, world.device)
        on_lane(
            world, world.lanes.slots[slot].dispatch, lambda: world.transport.dispatch(slot, 0, wave, exchange, buffer)
        )
        for s in wave.segments:
            assert torch.equal(buffer[s.row : s.row + s.num_rows], rows_of(s.rank, s.num_rows, world.device))


@pytest.mark.parametrize(
    ("exchange", "combine"),
    [("broadcast", "reduce"), ("broadcast", "gather"), ("padded", "reduce"), ("padded", "gather")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_combine_sums_every_ranks_part_at_the_owner(world, exchange, combine, dtype, counts):
    if (
        world.device.type == "cpu"
        and combine == "reduce"
        and dtype in (torch.bfloat16, torch.float16)
        and world.size > 1
    ):
        pytest.skip("MPI has no 16-bit sums")
    made = wave_of(world, counts, exchange)
    if made is None:
        pytest.skip("no rows on these ranks")
    _, wave = made
    own = [s for s in wave.segments if s.rank == world.rank]
    for slot in range(world.num_slots):
        of_rows = torch.arange(wave.num_rows, device=world.device).unsqueeze(1) % 7 + torch.zeros(
            WIDTH, device=world.device
        )
        partial = (of_rows * (world.rank + 1)).to(dtype)
        wanted = [of_rows[s.row : s.row + s.num_rows] * sum(range(1, world.size + 1)) for s in own]
        results = [
            torch.full(
                (s.num_rows, WIDTH),
                torch.nan,
                dtype=torch.float32 if combine == "gather" else dtype,
                device=world.device,
            )
            for s in own
        ]
        staging = torch.zeros((world.size - 1, wave.num_rows, WIDTH), dtype=dtype, device=world.device)
        sums = WaveSums(partial, results, staging)
        on_lane(
            world,
            world.lanes.slots[slot].combine,
            lambda: world.transport.combine(slot, 0, wave, exchange, combine, sums),
        )
        for r, w in zip(results, wanted):
            assert torch.equal(r.float(), w)  # whole numbers up to 256 with 8 ranks: exact in every dtype


@pytest.mark.parametrize(
    ("exchange", "combine"), [("broadcast", "reduce"), ("broadcast", "gather"), ("padded", "reduce")]
)
def test_the_log_is_what_the_plan_projects(world, exchange, combine):
    if world.size == 1:
        pytest.skip("a world of one issues nothing")
    p, wave = wave_of(world, COUNTS[0], exchange) or (None, None)
    if p is None:
        pytest.skip("no rows on these ranks")
    config = PlanConfig(mode=p.config.mode, combine=combine)
    p = plan(p.facts, p.shape, config)
    rows = torch.zeros((wave.num_rows, WIDTH), dtype=torch.uint8, device=world.device)
    partial = torch.zeros((wave.num_rows, WIDTH), device=world.device)
    results = [torch.zeros((s.num_rows, WIDTH), device=world.device) for s in wave.segments if s.rank == world.rank]
    sums = WaveSums(partial, results, torch.zeros((world.size - 1, wave.num_rows, WIDTH), device=world.device))
    world.transport.start_log()
    on_lane(world, world.lanes.slots[0].dispatch, lambda: world.transport.dispatch(0, 0, wave, exchange, rows))
    on_lane(world, world.lanes.slots[0].combine, lambda: world.transport.combine(0, 0, wave, exchange, combine, sums))
    log = world.transport.take_log()
    assert log == project(p, world.rank, WIDTH, 4)
    assert {i.communicator for i in log} <= {OpKind.DISPATCH.name.lower(), OpKind.COMBINE.name.lower()}


@pytest.mark.parametrize("exchange", ["broadcast", "padded"])
def test_every_rank_is_root_in_any_order_and_several_times(world, exchange):
    """Waves as no planner makes them: dispatched, then combined, on every slot."""
    waves = broadcast_waves(world.size) if exchange == "broadcast" else {"a block each": padded_wave(world.size)}
    total = sum(range(1, world.size + 1))
    for name, wave in waves.items():
        wanted = torch.full((wave.num_rows, WIDTH), 255, dtype=torch.uint8, device=world.device)
        own = [s for s in wave.segments if s.rank == world.rank]
        values = (torch.arange(wave.num_rows * WIDTH, device=world.device).view(-1, WIDTH) % 30 + 1).float()
        for slot, lanes in enumerate(world.lanes.slots):
            buffer = torch.full_like(wanted, 255)
            for s in wave.segments:
                wanted[s.row : s.row + s.num_rows] = rows_of(s.rank, s.stop, world.device)[s.start :]
            for s in own:
                buffer[s.row : s.row + s.num_rows] = wanted[s.row : s.row + s.num_rows]
            on_lane(world, lanes.dispatch, lambda: world.transport.dispatch(slot, 0, wave, exchange, buffer))
            assert torch.equal(buffer, wanted), name
            for combine in ("reduce", "gather"):
                staging = torch.full((world.size - 1, wave.num_rows, WIDTH), torch.nan, device=world.device)
                results = [torch.full((s.num_rows, WIDTH), torch.nan, device=world.device) for s in own]
                sums = WaveSums(values * (world.rank + 1), results, staging)
                work = lambda: world.transport.combine(slot, 0, wave, exchange, combine, sums)  # noqa: B023, E731
                on_lane(world, lanes.combine, work)
                for s, result in zip(own, results):
                    assert torch.equal(result, values[s.row : s.row + s.num_rows] * total), (name, combine)


def test_the_padded_combine_on_the_host_allocates_nothing(world, monkeypatch):
    if world.device.type == "cuda" or world.size == 1:
        pytest.skip("of the MPI transport")
    _, wave = wave_of(world, COUNTS[1], "padded")
    sums = WaveSums(torch.ones((wave.num_rows, WIDTH)), [torch.empty((1, WIDTH))], None)
    for name in ("empty", "zeros", "empty_like", "zeros_like"):
        monkeypatch.setattr(torch, name, None)
    on_lane(world, world.lanes.slots[0].combine, lambda: world.transport.combine(0, 0, wave, "padded", "reduce", sums))
    assert bool((sums.results[0] == world.size).all())


# With what says what they are for, the first collective has room for 492 of these bytes.
@pytest.mark.parametrize("size", [0, 1, 492, 493, 4096])
def test_gathering_brings_every_ranks_bytes_whatever_their_size(world, size):
    sizes = [size if rank % 2 == 0 else 3 for rank in range(world.size)]
    found = world.all_gather(bytes([world.rank]) * sizes[world.rank])
    assert found == [bytes([rank]) * n for rank, n in enumerate(sizes)]
