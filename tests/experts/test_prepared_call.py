"""Launches packed once say the same, whatever calls came before, as launches of a call that is the first of its
scratch.
"""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from pipemoe.errors import InputError
from pipemoe.experts.ampere import AmpereExperts
from pipemoe.experts.hopper import MAX_LAYOUTS, HopperExperts
from pipemoe.experts.hopper_fp8 import HopperFp8Experts
from pipemoe.wire import WireFormat
from pipemoe_kernels.gemm import tile_shape
from pipemoe_kernels.gemm.tile_shape import ROWS_128, ROWS_192, ROWS_256
from tests.experts import cuda_stand_in
from tests.experts.oracle import random_weights

CPU, BF16 = torch.device("cpu"), torch.bfloat16
HIDDEN, TOP_K, MAX_ROWS = 512, 4, 3000
IMPLEMENTATIONS = [HopperExperts, HopperFp8Experts, AmpereExperts]


@pytest.fixture
def launched(monkeypatch):
    return cuda_stand_in.install(monkeypatch)


def make(implementation, num_layers=2, first_expert=3, bias=False, **settings):
    bias = bias and implementation is not HopperFp8Experts
    layers = [
        random_weights(5, HIDDEN, 128 * (i + 1), dtype=BF16, first_expert=first_expert, bias=bias)
        for i in range(num_layers)
    ]
    return implementation(layers, top_k=TOP_K, hidden=HIDDEN, device=CPU, dtype=BF16, **settings)


def make_rows(experts, num_rows):
    wire = WireFormat(HIDDEN, TOP_K, experts.wire_dtype)
    return wire.rows(torch.zeros((num_rows + 1, wire.row_bytes), dtype=torch.uint8))[1:]


def calls():
    """Layer, rows, columns left of out, dtype of out: few pairs and many, out off 16-byte boundaries, layouts
    that come again.
    """
    return [
        (0, 3000, 0, BF16),
        (1, 5, 0, BF16),
        (0, 7, 8, BF16),
        (0, 1, 1, torch.float32),
        (0, 2999, 0, BF16),
        (1, 1500, 0, BF16),
    ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_later_calls_launch_what_first_ones_would(implementation, bias, launched):
    experts = make(implementation, bias=bias)
    scratch = experts.new_scratch(MAX_ROWS)
    for layer, num_rows, left, dtype in calls():
        rows, out = make_rows(experts, num_rows), torch.empty((num_rows, HIDDEN + left), dtype=dtype)[:, left:]
        launched.clear()
        experts(layer, rows, out, scratch)
        found = list(launched)
        kept = dict(scratch.calls)
        scratch.calls.clear()
        launched.clear()
        experts(layer, rows, out, scratch)
        assert found == launched and len(found) == (4 if num_rows * TOP_K <= 4096 else 5)
        assert all(launch.stream == 7 and launch.grid[0] >= 1 for launch in launched)
        scratch.calls = kept
    assert len(scratch.calls) == 4


def test_what_a_call_says(launched):
    """Places of the arguments, by name."""
    experts = make(HopperExperts, bias=True)
    scratch = experts.new_scratch(MAX_ROWS)
    rows, out = make_rows(experts, 600), torch.empty((700, HIDDEN), dtype=BF16)[:600]
    for _ in range(2):
        launched.clear()
        experts(1, rows, out, scratch)
    index, gate_up, down, combine = (
        {name: launch.arguments[launch.kernel.index_of(name)] for name in _names(launch)} for launch in launched
    )
    stride = rows.buffer.shape[1]
    assert (
        index["ids"] == rows.ids.data_ptr() and index["row_stride"] == stride // 4 and index["num_pairs"] == 600 * TOP_K
    )
    assert index["tokens"] == scratch.tokens.data_ptr() and index["first_expert"] == 3 and index["num_local"] == 5
    assert gate_up["x"] == rows.hidden.data_ptr() and gate_up["x_stride"] == stride // 16 and gate_up["depth"] == HIDDEN
    assert gate_up["out"] == scratch.a.data_ptr() and gate_up["bias"] == experts.weights[1].gate_up_bias.data_ptr()
    assert (
        down["x"] == scratch.a_maps[256, ROWS_128]
        and down["out"] == scratch.y.data_ptr()
        and down["num_columns"] == HIDDEN
    )
    assert (
        combine["weights"] == rows.weights.data_ptr()
        and combine["out"] == out.data_ptr()
        and combine["out_stride"] == HIDDEN
    )
    assert (
        combine["positions"] == scratch.positions.data_ptr()
        and combine["bias"] == experts.weights[1].down_bias.data_ptr()
    )
    assert [launch.grid for launch in launched] == [(1, 1), (132, 1), (132, 1), (600, 1)]


def test_tiles_by_the_rows_that_an_expert_can_expect(launched, monkeypatch):
    """Of 8 experts in all; calls of each shape stand beside the others."""
    monkeypatch.setattr(tile_shape, "PAIRED_OPERATIONS", 0)
    experts = make(HopperExperts, num_experts=8)
    scratch = experts.new_scratch(MAX_ROWS)
    for num_rows, shape in (
        (256, ROWS_192),
        (100, ROWS_128),
        (500, ROWS_128),
        (2048, ROWS_256),
        (300, ROWS_192),
        (256, ROWS_192),
    ):
        rows, out = make_rows(experts, num_rows), torch.empty((num_rows, HIDDEN), dtype=BF16)
        launched.clear()
        experts(0, rows, out, scratch)
        *_, gate_up, down, _ = launched
        assert (
            gate_up.kernel is experts._gate_up_kernel(0, shape).kernel
            and down.kernel is experts._down_kernel(shape).kernel
        )
        assert down.arguments[down.kernel.index_of("x")] == scratch.a_maps[128, shape]
    assert len(scratch.calls) == 3


def _names(launch):
    code = launch.kernel.function.__code__
    return code.co_varnames[: code.co_argcount]


def test_experts_that_leave_multiprocessors_have_calls_of_their_own(launched):
    experts = make(HopperExperts)
    scratch = experts.new_scratch(MAX_ROWS)
    rows, out = make_rows(experts, 1020), torch.empty((1020, HIDDEN), dtype=BF16)
    for wanted, those in ((132, experts), (100, experts.with_free_sms(32)), (132, experts)):
        launched.clear()
        those(1, rows, out, scratch)
        index, gate_up, down, combine = launched
        assert gate_up.grid == down.grid == (wanted, 1)
        # What waits for gate_up or down must not wait on multiprocessors that are left to others.
        assert gate_up.starts_early and down.starts_early == combine.starts_early == (wanted == 132)


def test_calls_that_do_not_fit_are_refused_when_others_are_ready(launched):
    experts = make(HopperExperts)
    scratch = experts.new_scratch(10)
    rows, out = make_rows(experts, 10), torch.empty((10, HIDDEN), dtype=BF16)
    experts(0, rows, out, scratch)
    launched.clear()
    many = make_rows(experts, 11)
    for layer, bad_rows, bad_out, message in (
        (0, rows, out[:9], "out is"),
        (0, rows[:9], out, "out is"),
        (0, many, torch.empty((11, HIDDEN), dtype=BF16), "do not fit a scratch"),
        (0, rows, torch.empty((10, HIDDEN + 8), dtype=BF16), "out is"),
        (0, rows, out.T.contiguous().T, "out is"),
        (0, rows, torch.empty(10, dtype=BF16), "out is"),
        (2, rows, out, "layer 2 does not exist"),
        (-1, rows, out, "layer -1 does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            experts(layer, bad_rows, bad_out, scratch)
    assert not launched


def test_no_rows_after_some(launched):
    experts = make(HopperExperts)
    scratch = experts.new_scratch(10)
    rows, out = make_rows(experts, 10), torch.ones((10, HIDDEN), dtype=BF16)
    experts(0, rows, out, scratch)
    before = len(launched)
    experts(0, rows[:0], out[:0], scratch)
    assert len(launched) == before


def test_layouts_that_never_come_again_are_forgotten(launched):
    experts = make(HopperExperts, num_layers=1)
    scratch = experts.new_scratch(1)
    rows = make_rows(experts, 1)
    for i in range(MAX_LAYOUTS + 3):
        experts(0, rows, torch.empty((1, HIDDEN + 8 * i), dtype=BF16)[:, :HIDDEN], scratch)
    assert len(scratch.calls) == 3
