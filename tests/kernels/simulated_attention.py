"""The attention kernels in the CUDA simulator; test_simulator.py runs this file."""

import pytest
import torch

from pipemoe_kernels.attention.heads import HeadForm
from pipemoe_kernels.attention.latents import LatentShape
from pipemoe_kernels.launch.kernel import Stream
from tests.kernels.attention_cases import check_heads, check_latents, check_norm

BF16, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
STREAM = Stream.current(torch.device("cpu"))


@pytest.mark.parametrize(
    "num_tokens, hidden, dtype, sums_dtype, options",
    [
        (3, 8, BF16, None, {}),
        (2, 264, BF16, BF16, {}),
        (2, 520, HALF, FLOAT, {}),
        (4, 264, BF16, FLOAT, {"placed": True}),
        (4, 24, HALF, None, {"placed": True, "copied": False}),
        (0, 8, BF16, BF16, {}),
    ],
)
def test_norm(num_tokens, hidden, dtype, sums_dtype, options):
    check_norm(num_tokens, hidden, dtype, sums_dtype, "cpu", STREAM, threads=32, **options)


@pytest.mark.parametrize(
    "num_query, num_key, form, dtype",
    [
        (3, 1, HeadForm(16, 16, eps=1e-6), BF16),
        (2, 2, HeadForm(48, 32), HALF),
        (2, 1, HeadForm(80, 80, eps=1e-5), BF16),
        (2, 1, HeadForm(24, 8, interleaved=True), BF16),
        (1, 1, HeadForm(40, 24, interleaved=True, eps=1e-6), HALF),
    ],
)
def test_heads(num_query, num_key, form, dtype):
    check_heads(3, num_query, num_key, form, dtype, "cpu", STREAM, threads=32)


def test_heads_of_no_token():
    check_heads(0, 2, 1, HeadForm(16, 16), BF16, "cpu", STREAM, threads=32)


@pytest.mark.parametrize(
    "shape, dtype",
    [
        (LatentShape(24, True, 16, 16, 8, 16, interleaved=True), BF16),
        (LatentShape(264, True, 272, 8, 32, 24, interleaved=False), HALF),
        (LatentShape(48, False, 16, 16, 8, 8, interleaved=True), BF16),
    ],
)
def test_latents(shape, dtype):
    check_latents(2, 3, shape, dtype, "cpu", STREAM)


def test_latents_of_no_token():
    check_latents(0, 2, LatentShape(24, True, 16, 16, 8, 16, interleaved=True), BF16, "cpu", STREAM)
