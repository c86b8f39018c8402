"""Waves over shared memory: what ranks read where it lies, in every order of segments, and when they may."""

import numpy as np
import pytest
import torch

from pipemoe.comm.shared.bells import Bells
from pipemoe.comm.shared.waves import SharedWaves, WaveMemory, add_in_order
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.planner import plan
from pipemoe.plan.projection import project
from pipemoe.plan.schedule import Facts, ModelShape
from tests.comm.shared.shared_ranks import memories
from tests.comm.wave_cases import broadcast_waves, padded_wave

WIDTH = 128


def ranks_of(num_ranks, dtype=torch.float32, rows=80):
    layout = WaveMemory(2, 2, rows, WIDTH, rows, WIDTH, dtype)
    waves, rung = memories(num_ranks, layout.num_bytes), memories(num_ranks, Bells.num_bytes(2))
    addresses = [memory.ctypes.data for memory in rung]
    by_rank = dict(enumerate(waves))
    made = [SharedWaves(r, num_ranks, layout, by_rank, Bells(r, addresses, 2, 0.0)) for r in range(num_ranks)]
    made[0].rung = rung  # kept alive
    return made


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_wave_goes_from_every_owner_to_every_rank_and_back(num_ranks, dtype):
    ranks = ranks_of(num_ranks, dtype)
    cases = [*broadcast_waves(num_ranks).values(), padded_wave(num_ranks)]
    for number, wave in enumerate(cases):
        place = number % 2, number // 2 % 2
        uses = [rank.use(*place, wave) for rank in ranks]
        assert len(set(uses)) == 1
        use = uses[0]
        for rank in ranks:
            assert rank.rows_free(*place, use).done() and rank.sums_free(*place, use).done()
        for owner in use.owners:
            assert not any(rank.sent(*place, use).done() for rank in ranks)
            ranks[owner].rows[place][owner].fill_(owner + 1)
            ranks[owner].tell_sent(*place, use)
        for rank in ranks:
            assert rank.sent(*place, use).done() and rank.summed(*place, use).missing() == num_ranks - rank.rank
            assert all(int(rank.rows[place][owner][-1, -1]) == owner + 1 for owner in use.owners)
            rank.sums[place][rank.rank].fill_(2**rank.rank)
            rank.tell_summed(*place, use)
        for rank in ranks:
            assert rank.summed(*place, use).done()
            own = [s for s in wave.segments if s.rank == rank.rank]
            for s in own:
                result = torch.full((s.num_rows, WIDTH), torch.nan, dtype=torch.float32)
                add_in_order([sums[s.row : s.row + s.num_rows] for sums in rank.sums[place].values()], result)
                assert bool((result == 2**num_ranks - 1).all())
            if own:
                rank.tell_combined(*place, use)


def test_a_buffer_is_free_when_its_last_readers_are_through():
    ranks = ranks_of(3)
    wave, other = broadcast_waves(3)["rank 0 alone"], broadcast_waves(3)["rank 1 alone"]
    first = [rank.use(0, 0, wave) for rank in ranks][0]
    second = [rank.use(0, 1, wave) for rank in ranks][0]
    third = [rank.use(0, 0, other) for rank in ranks][0]
    assert (first.number, second.number, third.number) == (1, 2, 3) and third.before == 1
    ranks[0].tell_sent(0, 0, first)
    for rank in ranks:
        assert not ranks[1].rows_free(0, 0, third).done()
        rank.tell_summed(0, 0, first)
    assert ranks[1].rows_free(0, 0, third).done()
    assert not ranks[2].sums_free(0, 0, third).done()  # rank 0 reads its sums yet
    ranks[0].tell_combined(0, 0, first)
    assert ranks[2].sums_free(0, 0, third).done()


@pytest.mark.parametrize(("dtype", "result"), [(torch.float32, torch.float32), (torch.float64, torch.float32)])
def test_sums_are_added_in_the_order_of_ranks(dtype, result):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(7, 33, generator=generator).to(dtype) * 1000 ** (r % 2) for r in range(4)]
    wanted = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    memory = torch.full((7, 66), torch.nan, dtype=result)
    for out in (memory[:, :33], memory[:, 33:].contiguous()):
        kept = [part.clone() for part in parts]
        add_in_order(parts, out)
        assert torch.equal(out, wanted.to(result)) and all(torch.equal(a, b) for a, b in zip(kept, parts))


def test_16_bit_parts_are_summed_in_float32():
    parts = [torch.full((1, 4), value, dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0)]
    out = torch.empty((1, 4))
    add_in_order(parts, out)
    assert (out == 258).all()  # in bfloat16, 256 + 1 is 256


@pytest.mark.parametrize("mode", ["padded", "broadcast"])
@pytest.mark.parametrize("combine", ["reduce", "gather"])
def test_the_log_is_what_the_plan_projects(mode, combine):
    p = plan(Facts(((3,), (), (17,))), ModelShape(WIDTH, 16, 4, 2, 1), PlanConfig(mode=mode, combine=combine))
    wave = p.cohorts[0].waves[0]
    for rank in ranks_of(3):
        rank.start_log()
        rank.note_dispatch(0, 0, wave, p.exchange(wave), WIDTH)
        rank.note_combine(0, 0, wave, p.exchange(wave), combine, torch.zeros((wave.num_rows, WIDTH)))
        assert rank.take_log() == project(p, rank.rank, WIDTH, 4)


def test_every_flag_and_matrix_has_its_place():
    layout = WaveMemory(2, 2, 5, WIDTH, 9, 7, torch.float64)
    (memory,) = memories(1, layout.num_bytes)
    places = [(slot, buffer) for slot in range(2) for buffer in range(2)]
    used = np.zeros(layout.num_bytes, int)
    for place in places:
        for flag in range(3):
            start = layout.flag(memory, *place, flag) - memory.ctypes.data
            used[start : start + 4] += 1
        for matrix, shape in ((layout.rows(memory, *place), (5, WIDTH)), (layout.sums(memory, *place), (9, 7))):
            assert tuple(matrix.shape) == shape
            start = matrix.data_ptr() - memory.ctypes.data
            used[start : start + matrix.nbytes] += 1
    assert used.max() == 1 and used.sum() == 4 * (12 + 5 * WIDTH + 9 * 7 * 8)
