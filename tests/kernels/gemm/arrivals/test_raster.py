"""What each block of the arrival-driven kernel takes, and when, against a naive oracle: the kernel's control flow in
Python threads.
"""

import importlib.util
from collections import Counter

import pytest
import torch

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from tests.kernels.arrival_threads import BATCHES, ENDS, FLAGS, TOKENS, Wave, launch, stand_ins
from tests.kernels.cases import expected_index

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # unsigned numbers wrap, as on a GPU

NUM_LOCAL, FIRST_EXPERT, TOP_K, EPOCH = 3, 1, 2, 7
OLD = (EPOCH - 1) << 32 | 0b1111  # what a call before has left in the batches


def make_wave(ids, part_rows, num_blocks):
    """The wave, and of each local pair: its place, expert and token."""
    tokens, ends, pairs, first = [-1] * ids.numel(), [], [], 0
    for count in part_rows:
        offsets, positions = expected_index(ids[first : first + count], FIRST_EXPERT, NUM_LOCAL)
        ends += offsets.tolist()
        for token, k in torch.nonzero(positions >= 0).tolist():
            place = TOP_K * first + int(positions[token, k])
            tokens[place] = token
            pairs.append((place, int(ids[first + token, k]) - FIRST_EXPERT, first + token))
        first += count
    count = len(part_rows)
    return Wave(num_blocks, [EPOCH - 1] * count, [OLD] * count, tokens, ends), pairs


def run(
    monkeypatch,
    ids,
    part_rows,
    groups,
    *,
    num_blocks=2,
    columns=300,
    depth=200,
    gated=True,
    waits=True,
    one_by_one=True,
):
    """Launch, let the parts of each group arrive together, and check all that was read and written."""
    wave, pairs = make_wave(ids, part_rows, num_blocks)
    kernel = stand_ins(wave, monkeypatch)(gated=gated, activation="silu" if waits else None)
    firsts = [sum(part_rows[:s]) for s in range(8)]
    row_bytes, w_row = 2 * columns, 0 if waits else 64
    arguments = (0, 1, TOKENS, TOP_K, ENDS, len(part_rows), *firsts, FLAGS, EPOCH, BATCHES)
    join = launch(wave, kernel.kernel, (*arguments, 0, w_row, NUM_LOCAL, columns, depth, 0, 0, row_bytes))
    for group in groups if waits else ():
        if one_by_one:
            wave.until_all_wait()
        wave.write_flags(group, EPOCH)
    join()
    covered = Counter()
    w_rows = 2 * columns if gated else columns
    expert_of = {place: expert for place, expert, _ in pairs}
    for (byte, width, bias), times in wave.stores.items():
        place, first_column = byte // row_bytes, byte % row_bytes // 2
        assert bias == 2 * (expert_of[place] * w_rows + first_column)
        for column in range(first_column, first_column + width):
            covered[place, column] += times
    assert covered == Counter((place, column) for place, _, _ in pairs for column in range(columns))
    read = Counter((expert, row) for _, expert, rows, first in wave.tiles for row in rows if first == w_row)
    assert read == Counter((expert, token if waits else place) for place, expert, token in pairs)
    assert not wave.released_early or not waits
    return wave


def batches(wave):
    """Parts of each batch of this call, in order."""
    masks = [word & 0xFFFFFFFF for word in wave.batches if word >> 32 == EPOCH]
    return [[s for s in range(8) if mask >> s & 1] for mask in masks]


def random_ids(num_rows):
    return torch.randint(0, 6, (num_rows, TOP_K), generator=torch.Generator().manual_seed(num_rows)).int()


@pytest.mark.parametrize("groups", [[[0, 1, 2]], [[2], [0], [1]], [[1], [0, 2]]])
def test_parts_that_arrive_together_share_tiles(groups, monkeypatch):
    wave = run(monkeypatch, random_ids(60), [23, 1, 36], groups)
    assert batches(wave) == groups


def test_flags_at_any_time(monkeypatch):
    wave = run(monkeypatch, random_ids(70), [10, 40, 15, 5], [[3], [1], [0], [2]], one_by_one=False)
    assert sorted(sum(batches(wave), [])) == [0, 1, 2, 3]


def test_all_rows_on_one_expert(monkeypatch):
    run(monkeypatch, torch.full((90, TOP_K), 2).int(), [50, 40], [[1], [0]], num_blocks=3)


def test_parts_without_local_pairs(monkeypatch):
    ids = random_ids(40)
    ids[:25] = 5
    run(monkeypatch, ids, [25, 15], [[0], [1]], columns=72)
    run(monkeypatch, torch.full((9, TOP_K), -1).int(), [4, 5], [[1], [0]])


def test_the_gemm_behind_reads_places_and_waits_for_nothing(monkeypatch):
    wave = run(monkeypatch, random_ids(60), [23, 1, 36], [], gated=False, waits=False)
    assert batches(wave) == []
