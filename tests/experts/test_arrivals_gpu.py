"""Arrival-driven calls on a GPU: the bits of an ordinary call, whenever and in whatever order the parts arrive.

A call that waits for ever would hold the GPU: every wait here has a deadline, and writes the missing flags when it
passes.
"""

import ctypes
import faulthandler
import importlib.util
import itertools
import os
import sys
import time
from functools import cache

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from pipemoe.experts import make_experts
from pipemoe.experts.arrivals import ArrivingExperts
from pipemoe.runtime.lanes import stream_lanes
from pipemoe_kernels.launch import driver
from tests.experts.oracle import (
    TOLERANCE,
    expected,
    random_rows,
    random_weights,
    relative_error,
    slice_experts,
    to_device,
)

BF16 = torch.bfloat16
DEADLINE_S = 20
DELAY_CYCLES = 300_000  # some 0.15 ms: the kernel has to wait
_WAIT_UNTIL_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ


@cache
def streams():
    """Two for parts, and one to free the GPU by; made one after the other, so that none shares a hardware queue with
    another.
    """
    lanes = stream_lanes(torch.device("cuda"), 1).slots[0]
    return lanes.dispatch.stream, lanes.combine.stream, lanes.compute.stream


class Layer:
    """Experts of one layer, with everything that a call needs."""

    def __init__(self, weights, top_k, max_rows, *, deterministic=False, column_blocks=(1,)):
        settings = {
            "top_k": top_k,
            "hidden": weights.hidden,
            "device": "cuda",
            "dtype": BF16,
            "deterministic": deterministic,
        }
        self.experts = make_experts([to_device(weights, "cuda")], implementation="hopper", **settings)
        self.arriving = ArrivingExperts(self.experts.with_free_sms(8))
        self.scratch = self.experts.new_scratch(max_rows)
        self.buffers = [self.arriving.new_arrivals(max_rows) for _ in range(2)]
        for arrivals in self.buffers:
            self.arriving.warm_up(arrivals, self.scratch, column_blocks)
        self.dtype = torch.float64 if deterministic else torch.float32
        *self.sides, _ = streams()

    def ordinary(self, rows):
        out = torch.full(rows.hidden.shape, torch.nan, dtype=self.dtype, device="cuda")
        self.experts(0, rows, out, self.scratch)
        return out

    def call(
        self,
        rows,
        part_rows,
        order,
        *,
        buffer=0,
        delay=DELAY_CYCLES,
        held=(),
        gate=None,
        events=(),
        before_release=None,
    ):
        """Every part's rows are copied, late, into a poisoned buffer on a side stream, in this order; those `held` on
        another one once gate[0] is 1, which it becomes here after the launch."""
        arrivals = self.buffers[buffer]
        received = random_rows(len(rows), rows.hidden.shape[1], 1, rows.ids.shape[1], dtype=BF16, device="cuda")
        received.buffer.fill_(0xAB)
        out = torch.full(rows.hidden.shape, torch.nan, dtype=self.dtype, device="cuda")
        self.scratch.a.fill_(torch.nan)
        self.scratch.y.fill_(torch.nan)
        first_rows = [0, *itertools.accumulate(part_rows)]
        self.arriving.expect(arrivals, 0, received, part_rows)
        for side in self.sides:
            side.wait_stream(torch.cuda.current_stream())
        if held:
            result = driver._library().cuStreamWaitValue32_v2(
                ctypes.c_void_p(self.sides[1].cuda_stream),
                ctypes.c_uint64(gate.data_ptr()),
                ctypes.c_uint32(1),
                _WAIT_UNTIL_EQUAL,
            )
            assert result == 0, result
        for part in order:
            rows_of = slice(first_rows[part], first_rows[part + 1])
            with torch.cuda.stream(self.sides[part in held]):
                if delay:
                    torch.cuda._sleep(delay)
                received.buffer[rows_of].copy_(rows.buffer[rows_of])
                self.arriving.arrived(arrivals, part)
        self.arriving(arrivals, out, self.scratch, events)
        done = torch.cuda.Event()
        done.record()
        if held:
            self.sides[0].synchronize()
            if before_release:
                before_release()
            waited = not done.query()
            gate[0] = 1
        wait(done, arrivals)
        assert not held or waited
        return out


def wait(done, arrivals):
    """Until the event, or until the deadline; then free the GPU, and fail."""

    def passed(seconds):
        deadline = time.monotonic() + seconds
        while not done.query():
            if time.monotonic() > deadline:
                return False
        return True

    if passed(DEADLINE_S):
        return
    rescue = streams()[2]
    for slot in range(len(arrivals.flags)):
        driver.write_word(rescue.cuda_stream, arrivals.flags.data_ptr() + 4 * slot, arrivals.epoch)
    if passed(DEADLINE_S / 4):
        pytest.fail(f"an arrival-driven call still waited after {DEADLINE_S} s; all flags written, it ended")
    print("an arrival-driven call never ends, not even with all flags written", file=sys.__stderr__, flush=True)
    os._exit(70)


@pytest.fixture(autouse=True)
def limit():
    """Even where the host itself is stuck in CUDA."""
    faulthandler.dump_traceback_later(6 * DEADLINE_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def layer():
    return Layer(random_weights(6, 256, 144, dtype=BF16), 3, 700)


@pytest.fixture
def gate():
    return torch.zeros(1, dtype=torch.int32).pin_memory()


def test_every_order(layer):
    rows = random_rows(600, 256, 6, 3, dtype=BF16, device="cuda")
    wanted = layer.ordinary(rows)
    assert (
        relative_error(wanted[::29], expected(rows[::29], to_device(layer.experts.weights[0], "cpu"))) < TOLERANCE[BF16]
    )
    for i, order in enumerate(itertools.permutations(range(4))):
        out = layer.call(rows, [37, 300, 1, 262], order, buffer=i % 2, delay=DELAY_CYCLES * (i % 2))
        assert torch.equal(out, wanted), order


@pytest.mark.parametrize("held", [(0, 1, 2, 3), (3,), (0, 2)])
def test_flags_that_come_when_the_host_says_so(layer, gate, held):
    rows = random_rows(500, 256, 6, 3, dtype=BF16, device="cuda", seed=1)
    wanted = layer.ordinary(rows)
    out = layer.call(rows, [100, 150, 50, 200], [2, 0, 3, 1], held=held, gate=gate)
    assert torch.equal(out, wanted)


def test_what_is_there_is_computed_while_the_rest_is_not(layer, gate):
    """gate_up has written the first parts' places, and no others, before the last one is released."""
    rows = random_rows(400, 256, 6, 3, dtype=BF16, device="cuda", seed=2)
    wanted = layer.ordinary(rows)
    a = layer.scratch.a[: 400 * 3 * 144].view(1200, 144)
    # Nothing may be allocated while a kernel waits: CUDA might wait for it.
    seen, places = torch.empty(1200, 144, dtype=BF16).pin_memory(), torch.empty(300, 3, dtype=torch.int32).pin_memory()

    def before_release():
        deadline = time.monotonic() + DEADLINE_S
        missing = True
        while missing and time.monotonic() < deadline:
            with torch.cuda.stream(layer.sides[0]):
                places.copy_(layer.buffers[0].positions[:300], non_blocking=True)
                seen.copy_(a, non_blocking=True)
            layer.sides[0].synchronize()
            missing = bool(seen[places[places >= 0].long()].isnan().any())
        released_late.append(not missing and bool(seen[900:].isnan().all()))

    released_late = []
    out = layer.call(rows, [100, 200, 100], [1, 0, 2], held=(2,), gate=gate, before_release=before_release)
    assert released_late == [True] and torch.equal(out, wanted)


@pytest.mark.parametrize("ids", [[2, 2, 2], [-1, 4, -1], [-1, -1, 9]])
@pytest.mark.parametrize("part_rows", [[0, 299, 0, 1], [300], [0, 0, 77, 223, 0, 0, 0, 0, 0]])
def test_skewed_routing_and_empty_parts(layer, ids, part_rows):
    """All rows on one expert, most experts without rows, no local pair at all."""
    rows = random_rows(300, 256, 6, 3, dtype=BF16, device="cuda", ids=torch.tensor([ids]).repeat(300, 1))
    wanted = layer.ordinary(rows)
    assert torch.equal(layer.call(rows, part_rows, range(len(part_rows))[::-1]), wanted)


def test_a_part_without_local_pairs(layer):
    ids = torch.randint(0, 6, (300, 3), generator=torch.Generator().manual_seed(0))
    ids[100:200] = -1
    rows = random_rows(300, 256, 6, 3, dtype=BF16, device="cuda", ids=ids)
    wanted = layer.ordinary(rows)
    for order in ([1, 0, 2], [0, 2, 1]):
        assert torch.equal(layer.call(rows, [100, 100, 100], order), wanted)


def test_no_rows_and_no_local_experts(layer):
    assert len(layer.call(random_rows(0, 256, 6, 3, dtype=BF16, device="cuda"), [0, 0], [1, 0])) == 0
    nobody = Layer(slice_experts(random_weights(3, 32, 24, dtype=BF16), range(1, 1)), 2, 5)
    out = nobody.call(random_rows(5, 32, 3, 2, dtype=BF16, device="cuda"), [2, 3], [1, 0])
    assert torch.equal(out.cpu(), torch.zeros(5, 32))


@pytest.mark.parametrize("activation, gated, bias", [("silu", True, False), ("relu", False, True)])
@pytest.mark.parametrize("hidden, intermediate", [(200, 136), (2880, 720), (16, 16)])
def test_awkward_sizes(hidden, intermediate, activation, gated, bias):
    form = {"bias": bias, "activation": activation, "gated": gated}
    weights = slice_experts(random_weights(10, hidden, intermediate, dtype=BF16, **form), range(2, 9))
    layer = Layer(weights, 3, 500)
    rows = random_rows(500, hidden, 10, 3, dtype=BF16, device="cuda")
    wanted = layer.ordinary(rows)
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        assert torch.equal(layer.call(rows, [17, 129, 1, 128, 225], order), wanted)


@pytest.mark.parametrize("hidden, num_blocks", [(2048, 3), (96, 5)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_columns_in_blocks(hidden, num_blocks, deterministic):
    layer = Layer(
        random_weights(6, hidden, 144, dtype=BF16), 3, 300, deterministic=deterministic, column_blocks=(1, num_blocks)
    )
    rows = random_rows(300, hidden, 6, 3, dtype=BF16, device="cuda")
    wanted = layer.ordinary(rows)
    events = [torch.cuda.Event() for _ in range(num_blocks)]
    assert torch.equal(layer.call(rows, [100, 50, 150], [2, 0, 1], events=events), wanted)
    assert all(event.query() for event in events)


def test_many_rounds_and_calls_one_after_the_other():
    """Enough tiles for several rounds of all blocks; calls are enqueued while the one before runs, with two buffers in
    turns.
    """
    layer = Layer(random_weights(16, 2048, 768, dtype=BF16), 8, 3000)
    calls = [random_rows(n, 2048, 16, 8, dtype=BF16, device="cuda", seed=n) for n in (3000, 40, 1500, 3000)]
    wanted = [layer.ordinary(rows) for rows in calls]
    torch.cuda.synchronize()
    outs = [torch.full_like(out, torch.nan) for out in wanted]
    for _ in range(3):
        side = layer.sides[0]
        for i, (rows, out) in enumerate(zip(calls, outs, strict=True)):
            arrivals = layer.buffers[i % 2]
            part_rows = [len(rows) // 4, len(rows) // 2, len(rows) - len(rows) // 2 - len(rows) // 4]
            layer.arriving.expect(arrivals, 0, rows, part_rows)
            with torch.cuda.stream(side):
                for part in (1, 2, 0):
                    torch.cuda._sleep(DELAY_CYCLES // 4)
                    layer.arriving.arrived(arrivals, part)
            layer.arriving(arrivals, out, layer.scratch)
        done = torch.cuda.Event()
        done.record()
        wait(done, arrivals)
        assert all(torch.equal(out, right) for out, right in zip(outs, wanted, strict=True))


def test_only_enqueues_and_allocates_nothing(layer):
    rows = random_rows(200, 256, 6, 3, dtype=BF16, device="cuda")
    wanted = layer.ordinary(rows)
    out = torch.full_like(wanted, torch.nan)
    torch.cuda.synchronize()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.arriving.expect(layer.buffers[0], 0, rows, [150, 50])
        with torch.cuda.stream(layer.sides[0]):
            layer.arriving.arrived(layer.buffers[0], 1)
            layer.arriving.arrived(layer.buffers[0], 0)
        layer.arriving(layer.buffers[0], out, layer.scratch)
        done = torch.cuda.Event()
        done.record()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations
    wait(done, layer.buffers[0])
    assert torch.equal(out, wanted)
