"""PipelinedMoE with rows that travel as e4m3: the right sums in every mode, the same bits, half the bytes, the same
errors.
"""

from functools import cache

import pytest
import torch

from pipemoe import Config, PipelinedMoE
from pipemoe.e4m3 import dequantise_rows, quantise_rows
from pipemoe.errors import ConfigError, MismatchError
from pipemoe.experts import ExpertWeights, local_range, quantise_experts
from pipemoe.plan.config import MODES
from tests.experts.oracle import expected, make_rows, random_weights, relative_error, slice_experts, to_device
from tests.experts.oracle_fp8 import expected_e4m3, make_e4m3_rows

pytestmark = pytest.mark.mpi
HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 256, 48, 7, 3
SMALL = {"moe_max_num_tokens": 24, "max_tokens_per_rank": 160, "dispatch_dtype": "float8_e4m3fn"}
COUNTS = ((37, 0, 5, 120), (0, 0, 3, 0), (1, 1, 1, 1))
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def make_moe(world, weights, **options):
    config = Config(**{**SMALL, "debug": True, **options})
    own = to_device(slice_experts(weights, local_range(NUM_EXPERTS, world.size, world.rank)), world.device)
    return PipelinedMoE(world, [own], num_experts=NUM_EXPERTS, top_k=TOP_K, config=config)


def make_tokens(num_tokens, seed, world, dtype):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, HIDDEN, generator=g).to(dtype)
    ids = torch.rand(num_tokens, NUM_EXPERTS, generator=g).argsort(dim=1)[:, :TOP_K]
    return tuple(t.to(world.device) for t in (x, ids, torch.rand(num_tokens, TOP_K, generator=g)))


def oracle(weights: ExpertWeights, x, ids, router):
    """Of the rows as they arrive: quantised once, on their owner."""
    return expected(
        make_rows(dequantise_rows(*quantise_rows(x.cpu()), torch.float64), ids.cpu(), router.cpu()), weights
    )


@pytest.fixture(scope="module")
def cases(world):
    """cases(dtype): the weights, and for each of COUNTS this rank's rows, the sums of the rows as they arrive, and of
    those that were sent; made once."""

    @cache
    def cases(dtype):
        weights, made = random_weights(NUM_EXPERTS, HIDDEN, INTERMEDIATE, dtype=dtype), []
        for case, counts in enumerate(COUNTS):
            rows = make_tokens(counts[world.rank % len(counts)], 10 * case + world.rank, world, dtype)
            made.append((rows, oracle(weights, *rows), expected(make_rows(*(t.cpu() for t in rows)), weights)))
        return weights, made

    return cases


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_sums_are_the_oracles(world, cases, mode, dtype):
    weights, made = cases(dtype)
    moe = make_moe(world, weights, mode=mode)
    for rows, wanted, plain in made:
        y = moe(*rows)
        assert y.shape == rows[0].shape and y.dtype == dtype
        assert relative_error(y, wanted) < DTYPES[dtype]
        if len(y) >= 5:  # the format's own error: of one row it may be larger
            assert relative_error(y, plain) < 4e-2


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_experts_that_multiply_e4m3(world, mode):
    if world.device.type != "cuda" or torch.cuda.get_device_capability(world.device) != (9, 0):
        pytest.skip("needs a Hopper GPU")
    weights = random_weights(NUM_EXPERTS, HIDDEN, 128, dtype=torch.bfloat16)
    moe = make_moe(world, weights, mode=mode, experts="hopper_fp8", dispatch_dtype=None)
    rows = make_tokens(COUNTS[0][world.rank % 4], world.rank, world, torch.bfloat16)
    narrow = make_e4m3_rows(make_rows(*(t.cpu() for t in rows)))
    assert relative_error(moe(*rows), expected_e4m3(narrow, quantise_experts(weights))) < 1e-2


def test_deterministic_rows_are_the_same_bits_in_every_mode(world):
    weights = random_weights(NUM_EXPERTS, HIDDEN, INTERMEDIATE)
    rows = make_tokens(COUNTS[0][world.rank % 4], world.rank, world, torch.float32)
    results = [
        make_moe(world, weights, mode=mode, deterministic=True)(*rows) for mode in ("broadcast", "per_rank", "chunked")
    ]
    assert all(torch.equal(result, results[0]) for result in results)


def test_rows_take_half_of_bfloat16s_bytes(world):
    weights = random_weights(NUM_EXPERTS, HIDDEN, INTERMEDIATE, dtype=torch.bfloat16)
    narrow, wide = make_moe(world, weights).runtime, make_moe(world, weights, dispatch_dtype=None).runtime
    assert (narrow.wire.row_bytes, wide.wire.row_bytes) == (384, 640)
    assert narrow.cost.dispatch.row_ps <= wide.cost.dispatch.row_ps


def test_another_format_on_one_rank_is_the_same_error_on_all(world):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    weights = random_weights(NUM_EXPERTS, HIDDEN, INTERMEDIATE)
    with pytest.raises(MismatchError, match=f"rank {world.size - 1}: .*dispatch"):
        make_moe(world, weights, **({"dispatch_dtype": None} if world.rank == world.size - 1 else {}))


def test_settings_that_cannot_work(world):
    with pytest.raises(ConfigError, match="dispatch_dtype is 'int8'; it must be one of float8_e4m3fn"):
        Config(dispatch_dtype="int8")
    weights = random_weights(NUM_EXPERTS, 96, INTERMEDIATE)
    with pytest.raises(ConfigError, match="hidden is 96; .* multiple of 128"):
        make_moe(world, weights)
