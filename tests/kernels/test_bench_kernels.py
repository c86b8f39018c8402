"""benchmarks/kernels.py as far as it goes without a GPU: its cells, its reference and the loop that it compares with."""

import pytest
import torch

import kernels
import kernels_table
import readme_table
import results_schema
from kernels_cases import LAYERS, TOKENS, Layer, enumerate_cells, expected_rows, make_rows, make_weights
from pipemoe.errors import InputError
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


def result(impl, ms, tokens=64, **changes):
    parts = {"routing_us": 2.0, "index_us": 3.0, "host_us": 30.0} if impl == "pipemoe" else dict.fromkeys(("routing_us", "index_us", "host_us"))
    row = {"layer": "a", "H": 64, "I": 32, "experts": 12, "local_experts": 5, "top_k": 3, "tokens": tokens, "pairs": 80, "dtype": "bf16"}
    row |= {"impl": impl, "ms": ms, "tflops": 5.0, "weight_gbps": 9.0, "floor_ms": 0.5, "ratio_to_floor": ms / 0.5, "rel_err": 2e-3}
    return row | parts | {"dense_tflops": 700.0, "copy_tbps": 4.2} | changes


def test_table_has_a_line_per_cell_and_a_column_per_implementation():
    rows = [result("pipemoe", 1.0), result("grouped_mm", 2.0), result("pipemoe", 4.0, 4096), result("liger", 2.0, 4096)]
    heading, first, second = kernels_table.kernels_cells(rows)
    assert first[:9] == ["64 / 32, 12, 5", "64", "80", "0.500", "1.000", "2.00", "5", "2.000", "-"]
    assert second[7:] == ["-", "2.000", "2.0", "3.0", "30.0"] and heading[7:9] == ["grouped mm", "liger"]
    summary = kernels_table.kernels_summary(rows)
    assert "2 cells: 1.00 x" in summary and "0.50 at worst" in summary and "5.0 us at most" in summary and "0.1 %" in summary


def test_rows_fit_the_schema_and_the_page():
    document = results_schema.results_document("kernels", [result("pipemoe", 1.0), result("liger", 2.0)])
    table = readme_table.markdown_table(document)
    assert "| 64 / 32, 12, 5 | 64 |" in table and "dense bf16 700 TFLOP/s" in table
    with pytest.raises(InputError, match="rel_err"):
        results_schema.results_document("kernels", [{**result("pipemoe", 1.0), "rel_err": "small"}])


def test_layers_route_as_their_families():
    assert LAYERS["deepseek-v3"].routing.num_groups == 8
    assert LAYERS["mixtral-8x7b-all"].routing.scoring == "softmax"
