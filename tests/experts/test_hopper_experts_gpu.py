"""The "hopper" and "ampere" experts on a GPU: against the oracle, deterministic, without host synchronisation or
allocation.
"""

import importlib.util
import threading

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

from pipemoe.errors import ConfigError
from pipemoe.experts import local_range, make_experts
from pipemoe.experts.hopper import HopperExperts
from pipemoe_kernels.gating import ACTIVATIONS
from tests.experts.oracle import (
    GATINGS,
    TOLERANCE,
    expected,
    random_rows,
    random_weights,
    relative_error,
    slice_experts,
    to_device,
)

BF16 = torch.bfloat16


@pytest.fixture(params=["hopper", "ampere"], autouse=True)
def implementation(request, monkeypatch):
    """Every test runs with both."""
    monkeypatch.setitem(DEFAULTS, "implementation", request.param)
    return request.param


DEFAULTS = {"implementation": "hopper"}


def build(weights, top_k, max_rows, *, implementation=None, deterministic=False, num_sms=None):
    experts = make_experts(
        [to_device(weights, "cuda")],
        top_k=top_k,
        hidden=weights.hidden,
        device="cuda",
        dtype=weights.dtype,
        implementation=implementation or DEFAULTS["implementation"],
        deterministic=deterministic,
        num_sms=num_sms,
    )
    scratch = experts.new_scratch(max_rows)
    experts.warm_up(scratch)
    return experts, scratch


def poison(scratch):
    for name in ("positions", "tokens", "offsets", "block_counts"):
        getattr(scratch, name).fill_(0)
    scratch.a.fill_(torch.nan)
    scratch.y.fill_(torch.nan)


def run(rows, weights, *, out_dtype=torch.float32, deterministic=False, max_rows=None, num_sms=None):
    experts, scratch = build(
        weights, rows.ids.shape[1], max_rows or len(rows), deterministic=deterministic, num_sms=num_sms
    )
    assert experts.implementation == DEFAULTS["implementation"]
    poison(scratch)
    out = torch.full(rows.hidden.shape, torch.nan, dtype=torch.float64 if deterministic else out_dtype, device="cuda")
    experts(0, rows, out, scratch)
    return out


@pytest.mark.parametrize("num_rows", [0, 1, 600])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("hidden, intermediate", [(96, 80), (16, 16), (304, 176), (2880, 720), (720, 2880)])
def test_awkward_sizes(num_rows, bias, hidden, intermediate):
    weights = slice_experts(random_weights(10, hidden, intermediate, dtype=BF16, bias=bias), range(2, 9))
    rows = random_rows(num_rows, hidden, 10, 3, dtype=BF16, device="cuda")
    sample = slice(0, num_rows, 7)
    wanted = expected(rows[sample], weights)
    assert relative_error(run(rows, weights)[sample], wanted) < TOLERANCE[BF16]
    assert relative_error(run(rows, weights, deterministic=True)[sample], wanted) < TOLERANCE[BF16]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", [*({"activation": a, "gated": g} for a in ACTIVATIONS for g in (0, 1)), *GATINGS])
def test_gatings(form, bias):
    weights = random_weights(6, 208, 144, dtype=BF16, bias=bias, **form)
    rows = random_rows(300, 208, 6, 3, dtype=BF16, device="cuda")
    assert relative_error(run(rows, weights), expected(rows, weights)) < TOLERANCE[BF16]


@pytest.mark.parametrize("out_dtype", [torch.float32, BF16, torch.float16])
def test_result_is_the_float32_sum_rounded_once(out_dtype):
    weights = random_weights(6, 96, 80, dtype=BF16)
    rows = random_rows(150, 96, 6, 3, dtype=BF16, device="cuda")
    assert torch.equal(run(rows, weights, out_dtype=out_dtype), run(rows, weights).to(out_dtype))


def test_rows_of_out_off_16_byte_boundaries():
    weights = random_weights(6, 96, 80, dtype=BF16, bias=True)
    rows = random_rows(150, 96, 6, 3, dtype=BF16, device="cuda")
    experts, scratch = build(weights, 3, 150)
    out = torch.full((150, 97), torch.nan, dtype=BF16, device="cuda")
    experts(0, rows, out[:, 1:], scratch)
    assert relative_error(out[:, 1:], expected(rows, weights)) < TOLERANCE[BF16]
    assert bool(out[:, 0].isnan().all())


@pytest.mark.parametrize("ids", [[2, -1], [2, 2], [-1, -1], [7, 8]])
def test_skewed_routing(ids):
    """All rows on one expert, named twice, no local pair at all."""
    weights = random_weights(4, 96, 80, dtype=BF16)
    rows = random_rows(300, 96, 4, 2, dtype=BF16, device="cuda", ids=torch.tensor([ids]).repeat(300, 1))
    assert relative_error(run(rows, weights), expected(rows, weights)) < TOLERANCE[BF16]


def test_no_local_expert_gives_zeros():
    weights = slice_experts(random_weights(3, 32, 24, dtype=BF16), range(1, 1))
    out = run(random_rows(5, 32, 3, 2, dtype=BF16, device="cuda"), weights)
    assert torch.equal(out.cpu(), torch.zeros(5, 32))


def test_nan_stays_in_its_row():
    weights = random_weights(4, 96, 80, dtype=BF16)
    ids = torch.arange(4).expand(50, 4)
    rows = random_rows(50, 96, 4, 4, dtype=BF16, device="cuda", ids=ids)
    clean = run(rows, weights)
    rows.hidden[17] = torch.nan
    out = run(rows, weights)
    others = torch.arange(50, device="cuda") != 17
    assert bool(out[17].isnan().all())
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("hidden, intermediate", [(96, 80), (2048, 768)])
def test_deterministic_bits(hidden, intermediate):
    """A row's bits: again, alone, in another order, on other grids, in any split of the experts over ranks."""
    weights = random_weights(10, hidden, intermediate, dtype=BF16, bias=True)
    rows = random_rows(700, hidden, 10, 4, dtype=BF16, device="cuda")
    whole = run(rows, weights, deterministic=True)
    assert relative_error(whole[:20], expected(rows[:20], weights)) < TOLERANCE[BF16]
    assert torch.equal(run(rows, weights, deterministic=True, max_rows=3000), whole)
    for num_sms in (1, 7, 100):
        assert torch.equal(run(rows, weights, deterministic=True, num_sms=num_sms), whole)
    for part in (slice(0, 1), slice(333, 334), slice(100, 229), slice(699, 700)):
        assert torch.equal(run(rows[part], weights, deterministic=True), whole[part])
    order = torch.randperm(700, generator=torch.Generator().manual_seed(3))
    shuffled = random_rows(700, hidden, 10, 4, dtype=BF16, device="cuda")
    shuffled.buffer.copy_(rows.buffer[order.cuda()])
    assert torch.equal(run(shuffled, weights, deterministic=True), whole[order.cuda()])
    for num_ranks in (2, 3, 4):
        splits = [slice_experts(weights, local_range(10, num_ranks, rank)) for rank in range(num_ranks)]
        assert torch.equal(sum(run(rows, split, deterministic=True) for split in splits), whole)


@pytest.mark.parametrize("gated, bias", [(True, False), (False, True)])
def test_the_same_bits_whatever_the_tile(gated, bias):
    """Rows per expert around every size of a tile and of a warpgroup's part of it."""
    weights = random_weights(8, 704, 560, dtype=BF16, bias=bias, gated=gated, activation="silu")
    counts = (1, 63, 64, 65, 128, 130, 192, 400)
    ids = torch.repeat_interleave(torch.arange(8), torch.tensor(counts))
    ids = torch.stack([ids, ids.roll(200)], dim=1)[torch.randperm(len(ids), generator=torch.Generator().manual_seed(5))]
    rows = random_rows(len(ids), 704, 8, 2, dtype=BF16, device="cuda", ids=ids)
    outs = []
    for tile_rows, num_sms in ((128, None), (192, None), (192, 7), (192, 1), (256, None), (256, 7), (256, 1)):
        settings = {"top_k": 2, "hidden": 704, "device": torch.device("cuda"), "dtype": BF16}
        experts = HopperExperts([to_device(weights, "cuda")], **settings, num_sms=num_sms, tile_rows=tile_rows)
        scratch = experts.new_scratch(len(rows))
        poison(scratch)
        outs.append(torch.full((len(rows), 704), torch.nan, device="cuda"))
        experts(0, rows, outs[-1], scratch)
    assert relative_error(outs[0], expected(rows, weights)) < TOLERANCE[BF16]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_only_enqueues_and_allocates_nothing():
    """A call can be captured into a CUDA graph, and its replay does the same."""
    weights = random_weights(10, 96, 80, dtype=BF16, bias=True)
    rows = random_rows(200, 96, 10, 3, dtype=BF16, device="cuda")
    experts, scratch = build(weights, 3, 200)
    assert scratch.transient_bytes == 0
    eager, captured = (torch.full((200, 96), torch.nan, device="cuda") for _ in range(2))
    torch.cuda.synchronize()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts(0, rows, eager, scratch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        experts(0, rows, captured, scratch)
    poison(scratch)
    graph.replay()
    assert torch.equal(captured, eager)


def test_a_new_thread_and_a_side_stream():
    weights, rows = random_weights(10, 96, 80, dtype=BF16), random_rows(200, 96, 10, 3, dtype=BF16, device="cuda")
    experts, scratch = build(weights, 3, 200)
    first, second = (torch.full((200, 96), torch.nan, device="cuda") for _ in range(2))
    experts(0, rows, first, scratch)
    torch.cuda.synchronize()

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            experts(0, rows, second, scratch)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(first, second)


def test_calls_one_after_the_other_with_one_scratch():
    """Kernels start before the ones in front of them have ended: nothing of one call may leak into the next."""
    weights = random_weights(8, 256, 128, dtype=BF16)
    experts, scratch = build(weights, 4, 900)
    calls = [random_rows(n, 256, 8, 4, dtype=BF16, device="cuda", seed=n) for n in (900, 3, 300, 1, 900, 77)]
    alone = [torch.empty(len(rows), 256, device="cuda") for rows in calls]
    for rows, out in zip(calls, alone, strict=True):
        experts(0, rows, out, scratch)
        torch.cuda.synchronize()
    for _ in range(5):
        outs = [torch.full_like(out, torch.nan) for out in alone]
        torch.cuda.synchronize()
        for rows, out in zip(calls, outs, strict=True):
            experts(0, rows, out, scratch)
        assert all(torch.equal(out, wanted) for out, wanted in zip(outs, alone, strict=True))


def test_what_it_cannot_run():
    odd = random_weights(3, 100, 36, dtype=BF16)
    assert build(odd, 2, 5, implementation="auto")[0].implementation == "torch"
    assert build(random_weights(3, 96, 80), 2, 5, implementation="auto")[0].implementation == "torch"
    assert build(random_weights(3, 96, 80, dtype=BF16), 2, 5, implementation="auto")[0].implementation == "hopper"
    assert build(random_weights(3, 96, 80, dtype=BF16), 2, 5, implementation="torch")[0].implementation == "torch"
    with pytest.raises(ConfigError, match="multiples of 8"):
        build(odd, 2, 5)


def test_experts_that_leave_multiprocessors_share_their_weights():
    experts, _ = build(random_weights(4, 96, 80, dtype=BF16), 4, 16)
    fewer = experts.with_free_sms(5)
    assert fewer.num_sms == experts.num_sms - 5 and fewer.weights is experts.weights
    assert experts.with_free_sms(10**6).num_sms == 1


def test_bits_do_not_depend_on_the_shape_of_tiles():
    weights = random_weights(4, 304, 176, dtype=BF16, bias=True)
    settings = {"top_k": 2, "hidden": 304, "device": torch.device("cuda"), "dtype": BF16}
    weights = [to_device(weights, "cuda")]
    makers = [{"tile_rows": 128}, {"tile_rows": 192}, {"tile_rows": 256}, {"num_experts": 4}]
    for num_rows in (1, 64, 256, 300, 400, 1000):
        rows = random_rows(num_rows, 304, 4, 2, dtype=BF16, device="cuda", seed=num_rows)
        outs = []
        for maker in makers:
            experts = HopperExperts(weights, **settings, **maker)
            scratch = experts.new_scratch(num_rows)
            experts.warm_up(scratch)
            poison(scratch)
            outs.append(torch.full((num_rows, 304), torch.nan, device="cuda"))
            experts(0, rows, outs[-1], scratch)
        assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_bits_whatever_multiprocessors_are_left(deterministic):
    """With one scratch."""
    weights = random_weights(10, 2048, 768, dtype=BF16)
    rows = random_rows(1500, 2048, 10, 4, dtype=BF16, device="cuda")
    experts, scratch = build(weights, 4, 1500, deterministic=deterministic)
    wanted = run(rows, weights, deterministic=deterministic, out_dtype=experts.out_dtypes[0])
    assert relative_error(wanted[:20], expected(rows[:20], weights)) < TOLERANCE[BF16]
    for left in (0, 3, 13, 26, 131):
        out = torch.full_like(wanted, torch.nan)
        experts.with_free_sms(left)(0, rows, out, scratch)
        assert torch.equal(out, wanted), left
