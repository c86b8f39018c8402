"""The workspace: every buffer of the size that the configuration says, and no other; all are there at once."""

from types import SimpleNamespace

import pytest
import torch

from pipemoe import Config
from pipemoe.runtime.workspace import Workspace
from pipemoe.wire import WireFormat

HIDDEN, TOP_K = 96, 3
CPU = torch.device("cpu")
WIRE = WireFormat(HIDDEN, TOP_K, torch.bfloat16)


class Experts:
    """Scratch that says for how many rows it is: 1,000 bytes a row."""

    def new_scratch(self, max_rows):
        return SimpleNamespace(num_bytes=1000 * max_rows)


def workspace(num_ranks, combine_dtype=torch.bfloat16, **options):
    return Workspace(Config(**options), WIRE, combine_dtype, num_ranks, Experts(), CPU)


# Options: rows of a wave, slots, double buffers, and own rows that a rank may have in a wave.
CASES = {
    "capped": ({"mode": "per_rank", "moe_max_num_tokens": 50, "max_tokens_per_rank": 40, "num_slots": 3}, 50, 3, 2, 40),
    "ranks bring less than the cap": (
        {"mode": "auto", "moe_max_num_tokens": 500, "max_tokens_per_rank": 40, "num_slots": 2},
        160,
        2,
        2,
        40,
    ),
    "a cap below a rank's": (
        {"mode": "chunked", "moe_max_num_tokens": 30, "max_tokens_per_rank": 40, "num_slots": 4},
        30,
        1,
        2,
        30,
    ),
    "two batches": (
        {"mode": "two_batch", "moe_max_num_tokens": 30, "max_tokens_per_rank": 40, "num_slots": 4},
        30,
        2,
        2,
        30,
    ),
    "uncapped": ({"mode": "padded", "moe_max_num_tokens": 30, "max_tokens_per_rank": 40}, 160, 1, 1, 40),
}


@pytest.mark.parametrize("combine", ["reduce", "gather"])
@pytest.mark.parametrize("name", CASES)
def test_every_buffer_is_of_the_size_that_the_configuration_says(name, combine):
    options, rows, num_slots, num_buffers, own_rows = CASES[name]
    made = workspace(4, combine=combine, **options)
    assert len(made.slots) == num_slots
    for slot in made.slots:
        assert [t.shape for t in slot.receive] == [(rows, WIRE.row_bytes)] * num_buffers
        assert [t.shape for t in slot.partial] == [(rows, HIDDEN)] * num_buffers
        assert all(t.dtype is torch.uint8 and not t.any() for t in slot.receive)
        assert all(t.dtype is torch.bfloat16 and not t.any() for t in slot.partial)
        staged = [None if t is None else t.shape for t in slot.staging]
        assert staged == [(3, own_rows, HIDDEN) if combine == "gather" else None] * num_buffers
        assert slot.scratch.num_bytes == 1000 * rows
    tensors = [t for s in made.slots for t in (*s.receive, *s.partial, *s.staging) if t is not None]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)
    of_staging = 3 * own_rows * HIDDEN * 2 if combine == "gather" else 0
    assert made.num_bytes == num_slots * (
        num_buffers * (rows * WIRE.row_bytes + rows * HIDDEN * 2 + of_staging) + 1000 * rows
    )
    assert made.sum_bytes == (2 * own_rows * HIDDEN * 4 if combine == "gather" else 0)


def test_sums_in_float64_take_more():
    made = workspace(
        2, combine="gather", combine_dtype=torch.float64, mode="chunked", moe_max_num_tokens=30, max_tokens_per_rank=40
    )
    assert made.sum_bytes == 2 * 30 * HIDDEN * 8 and made.slots[0].partial[0].dtype is torch.float64


def test_one_rank_stages_nothing():
    made = workspace(1, combine="gather", mode="chunked", moe_max_num_tokens=30, max_tokens_per_rank=40)
    assert made.slots[0].staging == [None, None] and made.sum_bytes == 0


@pytest.mark.parametrize(("combine", "combine_dtype", "dtype"), [
    ("reduce", torch.bfloat16, torch.bfloat16),
    ("reduce", torch.float64, torch.float64),
    ("gather", torch.bfloat16, torch.float32),
    ("gather", torch.float64, torch.float32),
])  # fmt: skip
def test_results_are_what_the_combine_writes(combine, combine_dtype, dtype):
    made = workspace(
        2, combine=combine, combine_dtype=combine_dtype, mode="chunked", moe_max_num_tokens=30, max_tokens_per_rank=40
    )
    results = made.new_results(7)
    assert results.shape == (7, HIDDEN) and results.dtype is dtype is made.results_dtype and results.device == CPU
