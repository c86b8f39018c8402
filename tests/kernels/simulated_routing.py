"""The routing kernel in the CUDA simulator; test_simulator.py runs this file."""

import pytest
import torch

from pipemoe_kernels.launch.kernel import Stream
from pipemoe_kernels.placed_rows import PlacedRows
from pipemoe_kernels.routing import Scoring, route_placed_tokens, route_tokens, routing_kernel
from tests.kernels.routing_cases import CASES, RoutingCase, check_routing, make_logits

STREAM = Stream.current(torch.device("cpu"))


def run(logits, bias, case, max_experts=64):
    """With ids and weights as columns of wider rows, which must stay as they were."""
    max_experts = max(max_experts, -(-case.num_experts // 32) * 32)
    ids = torch.full((len(logits), case.top_k + 2), 77, dtype=torch.int32)
    weights = torch.full((len(logits), case.top_k + 1), 77.0)
    kernel = routing_kernel(logits.dtype, case.scoring, bias is not None, warps=1, max_experts=max_experts)
    places = ids[:, : case.top_k], weights[:, : case.top_k]
    route_tokens(STREAM, logits, bias, *places, case.scoring, case.num_groups, case.top_groups, kernel)
    assert bool((ids[:, case.top_k :] == 77).all()) and bool((weights[:, case.top_k :] == 77).all())
    return places


@pytest.mark.parametrize(
    "name, dtype, ties",
    [
        ("qwen3", torch.bfloat16, False),
        ("mixtral", torch.float32, True),
        ("awkward", torch.float32, True),
        ("awkward", torch.float16, False),
        ("groups of 32", torch.float32, True),
        ("groups of 48", torch.float32, False),
        ("one expert", torch.float16, False),
        ("all experts", torch.float32, True),
    ],
)
def test_against_the_oracle(name, dtype, ties):
    num_tokens = 1 if name == "qwen3" else 2  # with 128 experts a token takes seconds
    logits, bias = make_logits(CASES[name], num_tokens, dtype, ties=ties)
    check_routing(*run(logits, bias, CASES[name]), logits, bias, CASES[name])


@pytest.mark.parametrize("sigmoid", [False, True])
def test_nan(sigmoid):
    case = RoutingCase(8, 3, Scoring(sigmoid, renormalise=True), *((4, 2) if sigmoid else ()))
    logits = torch.randn(3, 8)
    logits[0] = torch.nan
    logits[1, 5] = torch.nan
    logits[2, :6] = -torch.inf
    check_routing(*run(logits, None, case), logits, None, case)


def test_no_tokens():
    ids, weights = run(torch.empty(0, 8), None, CASES["mixtral"])
    assert ids.shape == weights.shape == (0, 2)


def test_into_wire_rows_whose_place_is_read_from_memory():
    """The last token is padding: its row, and all else, stays as it was."""
    case = CASES["qwen3"]
    logits, _ = make_logits(case, 3, torch.bfloat16, ties=False)
    row_bytes, offset = 16 + 8 * case.top_k + 16, 16
    wire = torch.full((5, row_bytes), 0xAB, dtype=torch.uint8)
    rows = PlacedRows(torch.tensor([wire.data_ptr() + row_bytes, 2]), row_bytes)
    kernel = routing_kernel(logits.dtype, case.scoring, warps=1, max_experts=128, placed=True)
    route_placed_tokens(STREAM, logits, None, case.top_k, rows, offset, case.scoring, kernel=kernel)
    written = wire[1:3, offset : offset + 8 * case.top_k].clone().view(torch.int32)
    check_routing(
        written[:, case.top_k :].clone(),
        written[:, : case.top_k].clone().view(torch.float32),
        logits[:2],
        None,
        case,
    )
    wire[1:3, offset : offset + 8 * case.top_k] = 0xAB
    assert bool((wire == 0xAB).all())
