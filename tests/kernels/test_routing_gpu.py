"""The routing kernel on a GPU against the per-token oracle: any size, ties, NaN, strided rows, graph capture."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs sm_80"
    ),
]
if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from pipemoe.models.routing import SIGMOID, SOFTMAX, RoutingSpec, route
from pipemoe_kernels.launch.kernel import Stream
from pipemoe_kernels.routing import Scoring, route_tokens
from tests.kernels.routing_cases import CASES, RoutingCase, check_routing, make_logits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(logits, bias, case):
    """With ids and weights as columns of wider rows, which must stay as they were."""
    ids = torch.full((len(logits), case.top_k + 2), 77, dtype=torch.int32, device="cuda")
    weights = torch.full((len(logits), case.top_k + 1), 77.0, device="cuda")
    places = ids[:, : case.top_k], weights[:, : case.top_k]
    wide = torch.nn.functional.pad(logits, (0, 3), value=torch.nan).cuda()[:, : case.num_experts]
    stream = Stream.current(torch.device("cuda"))
    on_gpu = None if bias is None else bias.cuda()
    route_tokens(stream, wide, on_gpu, *places, case.scoring, case.num_groups, case.top_groups)
    assert bool((ids[:, case.top_k :] == 77).all()) and bool((weights[:, case.top_k :] == 77).all())
    return tuple(place.cpu() for place in places)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ties", [False, True])
def test_against_the_oracle(name, dtype, ties):
    logits, bias = make_logits(CASES[name], 101, dtype, ties=ties)
    check_routing(*run(logits, bias, CASES[name]), logits, bias, CASES[name])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_size(data):
    num_groups = data.draw(st.integers(1, 12))
    size = data.draw(st.integers(1 if num_groups == 1 else 2, 512 // num_groups))
    top_groups = data.draw(st.integers(1, num_groups))
    top_k = data.draw(st.integers(1, min(16, top_groups * size)))
    sigmoid = num_groups > 1 or data.draw(st.booleans())
    scoring = Scoring(sigmoid, renormalise=data.draw(st.booleans()))
    case = RoutingCase(num_groups * size, top_k, scoring, num_groups, top_groups, has_bias=sigmoid)
    seed = data.draw(st.integers(0, 99))
    logits, bias = make_logits(case, data.draw(st.integers(1, 9)), torch.float32, ties=True, seed=seed)
    check_routing(*run(logits, bias, case), logits, bias, case)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_nan(sigmoid):
    case = RoutingCase(40, 3, Scoring(sigmoid, renormalise=True), *((4, 2) if sigmoid else ()))
    logits = torch.randn(4, 40)
    logits[0] = torch.nan
    logits[1, 5] = torch.nan
    logits[2, :36] = -torch.inf
    ids, weights = run(logits, None, case)
    check_routing(ids, weights, logits, None, case)
    assert bool(weights[0].isnan().all()) and 5 not in ids[1]


def specs():
    for renormalise in (True, False):
        yield RoutingSpec(128, 8, scoring=SOFTMAX, renormalise=renormalise, round_weights=True)
    yield RoutingSpec(256, 8, scoring=SIGMOID, num_groups=8, top_groups=4, scale=2.5)
    yield RoutingSpec(1024, 8)  # more experts than the kernel takes


@pytest.mark.parametrize("spec", list(specs()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_routing_is_the_same_on_both_devices(spec, dtype):
    logits = torch.randn(1000, spec.num_experts).to(dtype)
    bias = torch.randn(spec.num_experts) * 0.1 if spec.scoring == SIGMOID else None
    wanted_ids, wanted_weights = route(logits, spec, bias)
    ids, weights = route(logits.cuda(), spec, None if bias is None else bias.cuda())
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    same = (ids.cpu() == wanted_ids).all(dim=1)
    assert same.float().mean() > (0.98 if spec.num_experts <= 512 else 0.3)  # torch.topk breaks ties as it likes
    torch.testing.assert_close(
        weights.cpu()[same], wanted_weights[same], rtol=2**-7 if spec.round_weights else 1e-5, atol=1e-7
    )


def test_one_launch_that_graphs_capture():
    spec = RoutingSpec(256, 8, scoring=SIGMOID, num_groups=8, top_groups=4, scale=2.5)
    logits, bias = torch.randn(64, 256, device="cuda"), torch.randn(256, device="cuda") * 0.1
    eager = route(logits, spec, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = route(logits, spec, bias)
    logits.neg_().neg_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        route(logits, spec, bias)
        torch.cuda.synchronize()
    launched = [event.key for event in profile.key_averages() if event.self_device_time_total > 0]
    assert len(launched) <= 1, launched  # none where the profiler cannot see kernels
