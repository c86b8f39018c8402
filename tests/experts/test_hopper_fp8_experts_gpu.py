"""The "hopper_fp8" experts on a GPU: against the oracles, deterministic, without host synchronisation or allocation."""

import importlib.util

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

from pipemoe.e4m3 import dequantise_rows
from pipemoe.errors import ConfigError
from pipemoe.experts import local_range, make_experts, quantise_experts
from tests.experts.oracle import (
    expected,
    make_rows,
    random_rows,
    random_weights,
    relative_error,
    slice_experts,
    to_device,
)
from tests.experts.oracle_fp8 import FORMAT_TOLERANCE, TOLERANCE, expected_e4m3, make_e4m3_rows

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


def build(weights, top_k, max_rows, *, implementation="hopper_fp8", **settings):
    experts = make_experts(
        [to_device(weights, "cuda")],
        top_k=top_k,
        hidden=weights.hidden,
        device="cuda",
        dtype=BF16,
        implementation=implementation,
        **settings,
    )
    scratch = experts.new_scratch(max_rows)
    experts.warm_up(scratch)
    return experts, scratch


def poison(scratch):
    for name in ("positions", "tokens", "offsets", "block_counts"):
        getattr(scratch, name).fill_(0)
    scratch.a.view(torch.uint8).fill_(0xFF)
    scratch.a_scales.fill_(torch.nan)
    scratch.y.fill_(torch.nan)


def run(rows, weights, *, deterministic=False, max_rows=None, num_sms=None):
    experts, scratch = build(
        weights, rows.ids.shape[1], max_rows or len(rows), deterministic=deterministic, num_sms=num_sms
    )
    poison(scratch)
    out = torch.full(
        rows.hidden.shape, torch.nan, dtype=torch.float64 if deterministic else torch.float32, device="cuda"
    )
    experts(0, rows, out, scratch)
    return out


@pytest.mark.parametrize("num_rows", [0, 1, 600])
@pytest.mark.parametrize("hidden, intermediate", [(128, 128), (640, 384), (2048, 768)])
def test_awkward_sizes(num_rows, hidden, intermediate):
    weights = slice_experts(random_weights(10, hidden, intermediate, dtype=BF16), range(2, 9))
    rows = random_rows(num_rows, hidden, 10, 3, dtype=BF16)
    narrow = make_e4m3_rows(rows, "cuda")
    out = run(narrow, weights)
    assert relative_error(out, expected_e4m3(narrow, quantise_experts(weights))) < TOLERANCE
    assert (
        relative_error(run(narrow, weights, deterministic=True), expected_e4m3(narrow, quantise_experts(weights)))
        < TOLERANCE
    )
    sample = slice(0, num_rows, 7)
    assert relative_error(out[sample], expected(rows[sample], weights)) < FORMAT_TOLERANCE


@pytest.mark.parametrize("ids", [[2, -1], [2, 2], [-1, -1], [7, 8]])
def test_skewed_routing(ids):
    """All rows on one expert, named twice, no local pair at all."""
    weights = random_weights(4, 256, 128, dtype=BF16)
    rows = make_e4m3_rows(random_rows(300, 256, 4, 2, dtype=BF16, ids=torch.tensor([ids]).repeat(300, 1)), "cuda")
    assert relative_error(run(rows, weights), expected_e4m3(rows, quantise_experts(weights))) < TOLERANCE


def test_no_local_expert_gives_zeros():
    weights = slice_experts(random_weights(3, 128, 128, dtype=BF16), range(1, 1))
    out = run(make_e4m3_rows(random_rows(5, 128, 3, 2, dtype=BF16), "cuda"), weights)
    assert torch.equal(out.cpu(), torch.zeros(5, 128))


def test_quantised_weights_are_taken_as_they_are():
    weights = random_weights(4, 256, 128, dtype=BF16)
    rows = make_e4m3_rows(random_rows(70, 256, 4, 2, dtype=BF16), "cuda")
    experts, scratch = build(quantise_experts(weights), 2, 70, implementation="auto")
    out = torch.full((70, 256), torch.nan, device="cuda")
    experts(0, rows, out, scratch)
    assert experts.implementation == "hopper_fp8" and torch.equal(out, run(rows, weights))


def test_nan_stays_in_its_row():
    weights = random_weights(4, 256, 128, dtype=BF16)
    wide = random_rows(50, 256, 4, 4, dtype=BF16, ids=torch.arange(4).expand(50, 4))
    clean = run(make_e4m3_rows(wide, "cuda"), weights)
    wide.hidden[17] = torch.nan
    out = run(make_e4m3_rows(wide, "cuda"), weights)
    others = torch.arange(50, device="cuda") != 17
    assert bool(out[17].isnan().all())
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("hidden, intermediate", [(256, 128), (2048, 768)])
def test_deterministic_bits(hidden, intermediate):
    """A row's bits: again, alone, in another order, on other grids, in any split of the experts over ranks."""
    weights = random_weights(10, hidden, intermediate, dtype=BF16)
    rows = make_e4m3_rows(random_rows(700, hidden, 10, 4, dtype=BF16), "cuda")
    whole = run(rows, weights, deterministic=True)
    assert torch.equal(run(rows, weights, deterministic=True, max_rows=3000), whole)
    for num_sms in (1, 100):
        assert torch.equal(run(rows, weights, deterministic=True, num_sms=num_sms), whole)
    for part in (slice(0, 1), slice(333, 334), slice(100, 229), slice(699, 700)):
        assert torch.equal(run(rows[part], weights, deterministic=True), whole[part])
    order = torch.randperm(700, generator=torch.Generator().manual_seed(3)).cuda()
    shuffled = make_e4m3_rows(random_rows(700, hidden, 10, 4, dtype=BF16), "cuda")
    shuffled.buffer.copy_(rows.buffer[order])
    assert torch.equal(run(shuffled, weights, deterministic=True), whole[order])
    for num_ranks in (2, 3):
        splits = [slice_experts(weights, local_range(10, num_ranks, rank)) for rank in range(num_ranks)]
        assert torch.equal(sum(run(rows, split, deterministic=True) for split in splits), whole)


def test_only_enqueues_and_allocates_nothing():
    """Writing rows and the call can be captured into a CUDA graph, and its replay does the same."""
    weights = random_weights(10, 256, 128, dtype=BF16)
    rows = make_e4m3_rows(random_rows(200, 256, 10, 3, dtype=BF16), "cuda")
    hidden, ids, router = torch.randn(200, 256, device="cuda").bfloat16(), rows.ids.clone(), rows.weights.clone()
    experts, scratch = build(weights, 3, 200)
    assert scratch.transient_bytes == 0
    rows.write(hidden, ids, router)
    eager, captured = (torch.full((200, 256), torch.nan, device="cuda") for _ in range(2))
    torch.cuda.synchronize()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows.write(hidden, ids, router)
        experts(0, rows, eager, scratch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows.write(hidden, ids, router)
        experts(0, rows, captured, scratch)
    poison(scratch)
    rows.buffer.fill_(0xFF)
    graph.replay()
    assert torch.equal(captured, eager)


def test_calls_one_after_the_other_with_one_scratch():
    """Kernels start before the ones in front of them have ended: nothing of one call may leak into the next."""
    weights = random_weights(8, 256, 128, dtype=BF16)
    experts, scratch = build(weights, 4, 900)
    calls = [make_e4m3_rows(random_rows(n, 256, 8, 4, dtype=BF16, seed=n), "cuda") for n in (900, 3, 300, 1, 900, 77)]
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


@pytest.mark.parametrize("implementation", ["torch", "hopper"])
def test_other_experts_take_the_same_rows(implementation):
    weights = random_weights(6, 256, 128, dtype=BF16)
    narrow = make_e4m3_rows(random_rows(150, 256, 6, 3, dtype=BF16), "cuda")
    experts, scratch = build(weights, 3, 150, implementation=implementation, dispatch_dtype=E4M3)
    out = torch.full((150, 256), torch.nan, device="cuda")
    experts(0, narrow, out, scratch)
    assert experts.implementation == implementation
    wide = make_rows(
        dequantise_rows(narrow.hidden.cpu(), narrow.scales.cpu(), torch.float64), narrow.ids.cpu(), narrow.weights.cpu()
    )
    assert relative_error(out, expected(wide, weights)) < TOLERANCE


def test_what_it_cannot_run():
    with pytest.raises(ConfigError, match="multiples of 128"):
        build(random_weights(3, 192, 128, dtype=BF16), 2, 5)
    with pytest.raises(ConfigError, match="biases"):
        build(random_weights(3, 128, 128, dtype=BF16, bias=True), 2, 5)
