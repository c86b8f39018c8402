"""The attention kernels on a GPU, against the same float64 oracles as in the simulator."""

import importlib.util

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs sm_80"
    ),
]
if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from pipemoe_kernels.attention.heads import HeadForm
from pipemoe_kernels.attention.latents import LatentShape
from pipemoe_kernels.launch.kernel import Stream
from pipemoe_kernels.placed_rows import PlacedRows
from pipemoe_kernels.routing import route_placed_tokens
from tests.kernels.attention_cases import check_heads, check_latents, check_norm
from tests.kernels.routing_cases import CASES, check_routing, make_logits

BF16, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32


def stream() -> Stream:
    return Stream.current(torch.device("cuda"))


@pytest.mark.parametrize(
    "hidden, dtype, sums_dtype",
    [
        (8, BF16, None),
        (264, HALF, FLOAT),
        (2048, BF16, BF16),
        (2048, BF16, HALF),
        (2880, HALF, None),
        (4096, HALF, HALF),
        (7168, BF16, FLOAT),
        (16384, BF16, BF16),
    ],
)
def test_norm(hidden, dtype, sums_dtype):
    for num_tokens, options in ((1, {}), (133, {"placed": True}), (70, {"placed": True, "copied": False}), (0, {})):
        check_norm(num_tokens, hidden, dtype, sums_dtype, "cuda", stream(), **options)


FORMS = [
    (32, 4, HeadForm(128, 128, eps=1e-6)),
    (8, 8, HeadForm(64, 64)),
    (5, 1, HeadForm(80, 80, eps=1e-5)),
    (3, 3, HeadForm(96, 96)),
    (16, 2, HeadForm(128, 64, eps=1e-6)),
    (12, 2, HeadForm(256, 256)),
    (7, 1, HeadForm(192, 64, interleaved=True, eps=1e-6)),
    (4, 2, HeadForm(40, 24, interleaved=True)),
    (4, 2, HeadForm(16, 16, eps=1e-6)),
]


@pytest.mark.parametrize("num_query, num_key, form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, HALF])
def test_heads(num_query, num_key, form, dtype):
    for num_tokens in (1, 67, 0):
        check_heads(num_tokens, num_query, num_key, form, dtype, "cuda", stream())


@pytest.mark.parametrize(
    "num_heads, shape",
    [
        (128, LatentShape(1536, True, 512, 128, 64, 128, interleaved=True)),
        (16, LatentShape(16 * 192, False, 512, 128, 64, 128, interleaved=True)),
        (5, LatentShape(776, True, 264, 48, 32, 40, interleaved=False)),
        (4, LatentShape(24, True, 16, 16, 8, 16, interleaved=True)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [BF16, HALF])
def test_latents(num_heads, shape, dtype):
    for num_tokens in (1, 67, 0):
        check_latents(num_tokens, num_heads, shape, dtype, "cuda", stream())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_into_placed_rows(name, dtype):
    case = CASES[name]
    logits, bias = make_logits(case, 101, dtype, ties=True)
    row_bytes, offset, count = 32 + 8 * 16, 16, 99
    wire = torch.full((103, row_bytes), 0xAB, dtype=torch.uint8, device="cuda")
    rows = PlacedRows(torch.tensor([wire.data_ptr() + row_bytes, count], device="cuda"), row_bytes)
    on_gpu = None if bias is None else bias.cuda()
    route_placed_tokens(
        stream(), logits.cuda(), on_gpu, case.top_k, rows, offset, case.scoring, case.num_groups, case.top_groups
    )
    found = wire[1 : count + 1, offset : offset + 8 * case.top_k]
    words = found.cpu().contiguous().view(torch.int32)
    weights, ids = words[:, : case.top_k].contiguous().view(torch.float32), words[:, case.top_k :].contiguous()
    check_routing(ids, weights, logits[:count], bias, case)
    found.fill_(0xAB)
    assert bool((wire == 0xAB).all())
