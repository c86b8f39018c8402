"""One small launch or two of every kernel family, with its check; launch/sanitize.sh runs this file under
compute-sanitizer.
"""

import pytest
import torch

from tests.experts.oracle import TOLERANCE, expected, random_rows, random_weights, relative_error
from tests.experts.test_hopper_experts_gpu import run as run_experts
from tests.kernels import test_attention_gpu as attention
from tests.kernels import test_few_gpu as few
from tests.kernels import test_hopper_kernels_gpu as hopper
from tests.kernels import test_kernels_gpu as any_gpu
from tests.kernels import test_routing_gpu as routing
from tests.kernels.cases import make_ids

pytestmark = [*hopper.pytestmark]


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_routing(name):
    routing.test_against_the_oracle({"softmax": "qwen3", "sigmoid": "deepseek-v3"}[name], torch.bfloat16, True)


def test_index():
    hopper.check_index(*make_ids("several tiles"))
    any_gpu.check_index(*make_ids("several tiles"))


def test_index_in_two_launches():
    generator = torch.Generator().manual_seed(1)
    hopper.check_index(torch.randint(-1, 20, (1500, 4), generator=generator).int(), 3, 9)


@pytest.mark.parametrize("num_sms, tile_rows", [(132, 128), (5, 128), (5, 192), (132, 256), (5, 256)])
def test_grouped_gemms(num_sms, tile_rows):
    hopper.test_grouped_gemms("mixed", 200, 136, num_sms, True, "silu", True, tile_rows)


def test_combine():
    hopper.test_combine(True, torch.bfloat16, 328)
    any_gpu.test_combine(True, torch.bfloat16, torch.float32)


def test_kernels_of_other_gpus():
    any_gpu.test_gather(96, torch.bfloat16)
    any_gpu.test_pack(96, torch.bfloat16)
    any_gpu.test_activations(True, torch.bfloat16, 13)
    any_gpu.test_grouped_gemm(torch.bfloat16, 9, 7)


@pytest.mark.parametrize("num_rows", [5, 300])
def test_experts(num_rows):
    weights = random_weights(6, 96, 80, dtype=torch.bfloat16, bias=True)
    rows = random_rows(num_rows, 96, 6, 3, dtype=torch.bfloat16, device="cuda")
    assert relative_error(run_experts(rows, weights), expected(rows, weights)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("window", [None, 100])
def test_attention(window):
    attention.Pieces([100, 0, 130, 1], [300, 0, 130, 20], gap=3).check(window)


def test_few_rows():
    few.test_few_rows(9, 48, 768, torch.bfloat16, torch.bfloat16, True)
    few.test_few_experts(3, 256, 256, 3, 5, 2, torch.float32)
