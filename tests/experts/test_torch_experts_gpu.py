"""The "torch" experts on a GPU: against the oracle, without host synchronisation, in bounded memory, deterministic."""

import importlib.util
import threading
import time

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from pipemoe.experts import local_range, make_experts
from tests.experts.oracle import (
    TOLERANCE,
    expected,
    random_rows,
    random_weights,
    relative_error,
    slice_experts,
    to_device,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def build(weights, top_k, max_rows, *, deterministic=False, layers=1):
    experts = make_experts(
        [to_device(weights, "cuda")] * layers,
        top_k=top_k,
        hidden=weights.hidden,
        device="cuda",
        dtype=weights.dtype,
        implementation="torch",
        deterministic=deterministic,
    )
    assert experts.implementation == "torch"
    scratch = experts.new_scratch(max_rows)
    experts.warm_up(scratch)
    return experts, scratch


def poison(scratch):
    for tensor in vars(scratch).values():
        if isinstance(tensor, torch.Tensor):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 2**30)


def run(rows, weights, *, out_dtype=torch.float32, deterministic=False, max_rows=None):
    experts, scratch = build(weights, rows.ids.shape[1], max_rows or len(rows), deterministic=deterministic)
    poison(scratch)
    out = torch.full(rows.hidden.shape, torch.nan, dtype=torch.float64 if deterministic else out_dtype, device="cuda")
    experts(0, rows, out, scratch)
    return out


@pytest.mark.parametrize("num_rows", [0, 1, 600])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_awkward_sizes(num_rows, bias, dtype):
    weights = slice_experts(random_weights(10, 96, 80, dtype=dtype, bias=bias), range(2, 9))
    rows = random_rows(num_rows, 96, 10, 3, dtype=dtype, device="cuda")
    wanted = expected(rows, weights)
    assert relative_error(run(rows, weights), wanted) < TOLERANCE[dtype]
    assert relative_error(run(rows, weights, deterministic=True), wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("hidden, intermediate", [(7, 5), (100, 36)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_that_grouped_mm_refuses(hidden, intermediate, dtype):
    weights = random_weights(5, hidden, intermediate, dtype=dtype, bias=True)
    rows = random_rows(70, hidden, 5, 2, dtype=dtype, device="cuda")
    assert relative_error(run(rows, weights), expected(rows, weights)) < TOLERANCE[dtype]


@pytest.mark.parametrize("out_dtype", DTYPES)
def test_result_is_the_float32_sum_rounded_once(out_dtype):
    weights = random_weights(6, 96, 80, dtype=torch.bfloat16)
    rows = random_rows(150, 96, 6, 3, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(run(rows, weights, out_dtype=out_dtype), run(rows, weights).to(out_dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", [[2, -1], [2, 2], [-1, -1], [7, 8]])
def test_skewed_routing(ids, dtype):
    """All rows on one expert, named twice, no local pair at all."""
    weights = random_weights(4, 96, 80, dtype=dtype)
    rows = random_rows(300, 96, 4, 2, dtype=dtype, device="cuda", ids=torch.tensor([ids]).repeat(300, 1))
    out, wanted = run(rows, weights), expected(rows, weights)
    assert relative_error(out, wanted) < TOLERANCE[dtype]


def test_no_local_expert_gives_zeros():
    weights = slice_experts(random_weights(3, 32, 24), range(1, 1))
    out = run(random_rows(5, 32, 3, 2, device="cuda"), weights)
    assert torch.equal(out.cpu(), torch.zeros(5, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_row(dtype):
    weights = random_weights(4, 96, 80, dtype=dtype)
    ids = torch.arange(4).expand(50, 4)
    rows = random_rows(50, 96, 4, 4, dtype=dtype, device="cuda", ids=ids)
    clean = run(rows, weights)
    rows.hidden[17] = torch.nan
    out = run(rows, weights)
    others = torch.arange(50, device="cuda") != 17
    assert out[17].isnan().all()
    assert torch.equal(out[others], clean[others])


def test_real_dimensions():
    """Qwen3-30B-A3B's layer on one of four ranks; the oracle looks at a sample of the rows."""
    weights = random_weights(32, 2048, 768, dtype=torch.bfloat16, first_expert=32)
    rows = random_rows(4096, 2048, 128, 8, dtype=torch.bfloat16, device="cuda")
    experts, scratch = build(weights, 8, 4096)
    out = torch.full((4096, 2048), torch.nan, device="cuda")
    experts(0, rows, out, scratch)
    for start in (0, 2000, 4090):
        sample = slice(start, start + 6)
        assert relative_error(out[sample], expected(rows[sample], weights)) < TOLERANCE[torch.bfloat16]
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    issued = time.perf_counter()
    for _ in range(20):
        experts(0, rows, out, scratch)
    issued = time.perf_counter() - issued
    stop.record()
    stop.synchronize()
    device_us, host_us = start.elapsed_time(stop) * 1e3 / 20, issued * 1e6 / 20
    print(f"\n T 4096  H 2048  I 768  E_loc 32  K 8  bf16   device {device_us:8.1f} us   host {host_us:8.1f} us a call")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_enqueues(dtype):
    """No synchronisation and no allocation from the driver: the call can be captured into a CUDA graph."""
    weights = random_weights(10, 96, 80, dtype=dtype, bias=True)
    rows = random_rows(200, 96, 10, 3, dtype=dtype, device="cuda")
    experts, scratch = build(weights, 3, 200)
    eager, captured = (torch.full((200, 96), torch.nan, device="cuda") for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts(0, rows, eager, scratch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        experts(0, rows, captured, scratch)
    poison(scratch)
    graph.replay()
    assert torch.equal(captured, eager)


def test_a_new_thread_and_a_side_stream():
    weights, rows = random_weights(10, 96, 80), random_rows(200, 96, 10, 3, device="cuda")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_stays_within_the_scratch(dtype):
    weights = random_weights(8, 512, 256, dtype=dtype)
    before = torch.cuda.memory_allocated()
    experts, scratch = build(weights, 4, 2000)
    inputs = {n: random_rows(n, 512, 8, 4, dtype=dtype, device="cuda") for n in (2000, 10, 700)}
    outs = {n: torch.empty(n, 512, device="cuda") for n in inputs}
    for n, rows in inputs.items():
        experts(0, rows, outs[n], scratch)
    resident = torch.cuda.memory_allocated()
    reserved = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(4):
        for n, rows in inputs.items():
            experts(0, rows, outs[n], scratch)
    assert torch.cuda.memory_reserved() == reserved
    own = scratch.num_bytes * 1.05 + 2**20
    assert torch.cuda.max_memory_allocated() - resident <= own
    assert resident - before <= own + weights.num_bytes + sum(
        2**20 + r.buffer.nbytes + outs[n].nbytes for n, r in inputs.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden, intermediate", [(96, 80), (2048, 768)])
def test_deterministic_bits(dtype, hidden, intermediate):
    """A row's bits: alone, in another order, in any split of the experts over ranks."""
    weights = random_weights(10, hidden, intermediate, dtype=dtype, bias=True)
    rows = random_rows(700, hidden, 10, 4, dtype=dtype, device="cuda")
    whole = run(rows, weights, deterministic=True)
    assert torch.equal(run(rows, weights, deterministic=True, max_rows=3000), whole)
    for part in (slice(0, 1), slice(333, 334), slice(100, 229), slice(699, 700)):
        assert torch.equal(run(rows[part], weights, deterministic=True), whole[part])
    order = torch.randperm(700, generator=torch.Generator().manual_seed(3))
    shuffled = random_rows(700, hidden, 10, 4, dtype=dtype, device="cuda")
    shuffled.buffer.copy_(rows.buffer[order.cuda()])
    assert torch.equal(run(shuffled, weights, deterministic=True), whole[order.cuda()])
    for num_ranks in (2, 3, 4):
        splits = [slice_experts(weights, local_range(10, num_ranks, rank)) for rank in range(num_ranks)]
        assert torch.equal(sum(run(rows, split, deterministic=True) for split in splits), whole)
