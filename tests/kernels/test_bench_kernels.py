"""benchmarks/kernels.py as far as it goes without a GPU: its cells, its reference and the loop that it compares with."""

import torch

import kernels
from kernels_cases import LAYERS, TOKENS, Layer, enumerate_cells, expected_rows, make_rows, make_weights
from tests.experts.oracle import TOLERANCE, expected, relative_error

LAYER = Layer(64, 32, 12, 5, 3)
CPU = torch.device("cpu")


def test_cells_are_all_layers_at_all_token_counts():
    cells = list(enumerate_cells(list(LAYERS), list(TOKENS)))
    assert len(cells) == 24 and len(set(cells)) == 24
    assert LAYERS["deepseek-v3"].expert_bytes == 2 * (4096 * 7168 + 7168 * 2048)


def test_rows_have_the_expected_number_of_local_pairs():
    rows = make_rows(LAYER, 400, CPU)
    assert abs(int((rows.ids < 5).sum()) - 500) <= 5
    assert all(len(set(ids.tolist())) == 3 for ids in rows.ids)


def test_reference_is_the_oracle():
    weights, rows = make_weights(LAYER, CPU), make_rows(LAYER, 30, CPU)
    sample = torch.tensor([0, 3, 29])
    wanted = expected(rows, weights)
    assert relative_error(expected_rows(rows, weights, sample), wanted[sample]) < 1e-12


def test_loop_over_experts():
    from kernels_peers import cublas_loop

    weights, rows = make_weights(LAYER, CPU), make_rows(LAYER, 30, CPU)
    out = torch.full((30, 64), torch.nan, dtype=torch.bfloat16)
    cublas_loop(weights, rows)(out)
    assert relative_error(out, expected(rows, weights)) < TOLERANCE[torch.bfloat16]


def test_fp8_is_another_format_of_ours():
    from kernels_peers import PEERS

    assert "pipemoe_fp8" in PEERS
    assert [kernels._dtype_of(impl) for impl in ("pipemoe", "pipemoe_fp8", "grouped_mm")] == ["bf16", "fp8", "bf16"]
    assert set(kernels.MAX_ERROR) == {"bf16", "fp8"}


def test_options():
    options = kernels.parse(["--layers", "deepseek-v3", "--tokens", "64,16384", "--impls", "pipemoe"])
    assert options.layers == ["deepseek-v3"] and options.tokens == [64, 16384] and options.impls == ["pipemoe"]
