"""benchmarks/kernels as far as it goes without a GPU: its cells, its reference, the loop that it compares with, a whole
run of stand-ins.
"""

import json

import pytest
import torch

from benchmarks import readme_table, results_schema
from benchmarks.kernels import __main__ as kernels
from benchmarks.kernels import judge as kernels_judge
from benchmarks.kernels import table as kernels_table
from benchmarks.kernels.cases import LAYERS, TOKENS, Layer, enumerate_cells, expected_rows, make_rows, make_weights
from benchmarks.kernels.field import FIELD
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
    from benchmarks.kernels.peers import cublas_loop

    weights, rows = make_weights(LAYER, CPU), make_rows(LAYER, 30, CPU)
    out = torch.full((30, 64), torch.nan, dtype=torch.bfloat16)
    cublas_loop(weights, rows)(out)
    assert relative_error(out, expected(rows, weights)) < TOLERANCE[torch.bfloat16]


def test_fp8_is_another_format_of_ours():
    from benchmarks.kernels.peers import PEERS

    assert "pipemoe_fp8" in PEERS
    assert [kernels._dtype_of(impl) for impl in ("pipemoe", "pipemoe_fp8", "grouped_mm")] == ["bf16", "fp8", "bf16"]
    assert set(kernels.MAX_ERROR) == {"bf16", "fp8"}


def test_options():
    options = kernels.parse(["--layers", "deepseek-v3", "--tokens", "64,16384", "--impls", "pipemoe"])
    assert options.layers == ["deepseek-v3"] and options.tokens == [64, 16384] and options.impls == ["pipemoe"]


def result(impl, ms, tokens=64, **changes):
    parts = (
        {"routing_us": 2.0, "index_us": 3.0, "host_us": 30.0}
        if impl == "pipemoe"
        else dict.fromkeys(("routing_us", "index_us", "host_us"))
    )
    row = {
        "layer": "a",
        "H": 64,
        "I": 32,
        "experts": 12,
        "local_experts": 5,
        "top_k": 3,
        "tokens": tokens,
        "pairs": 80,
        "dtype": "bf16",
    }
    row |= {
        "impl": impl,
        "ms": ms,
        "tflops": 5.0,
        "weight_gbps": 9.0,
        "floor_ms": 0.5,
        "ratio_to_floor": ms / 0.5,
        "rel_err": 2e-3,
    }
    return row | parts | {"dense_tflops": 700.0, "copy_tbps": 4.2} | changes


def test_table_has_a_line_per_cell_and_a_column_per_implementation():
    rows = [result("pipemoe", 1.0), result("grouped_mm", 2.0), result("pipemoe", 4.0, 4096), result("liger", 2.0, 4096)]
    heading, first, second = kernels_table.kernels_cells(rows)
    assert first[:9] == ["64 / 32, 12, 5", "64", "80", "0.500", "1.000", "2.00", "5", "2.000", "-"]
    assert second[7:] == ["-", "2.000", "2.0", "3.0", "30.0"] and heading[7:9] == ["grouped mm", "liger"]
    summary = kernels_table.kernels_summary(rows)
    assert (
        "2 cells: 1.00 x" in summary
        and "0.50 at worst" in summary
        and "5.0 us at most" in summary
        and "0.1 %" in summary
    )


def test_rows_fit_the_schema_and_the_page():
    document = results_schema.results_document("kernels", [result("pipemoe", 1.0), result("liger", 2.0)])
    table = readme_table.markdown_table(document)
    assert "| 64 / 32, 12, 5 | 64 |" in table and "dense bf16 700 TFLOP/s" in table
    with pytest.raises(InputError, match="rel_err"):
        results_schema.results_document("kernels", [{**result("pipemoe", 1.0), "rel_err": "small"}])


def test_layers_route_as_their_families():
    assert LAYERS["deepseek-v3"].routing.num_groups == 8
    assert LAYERS["mixtral-8x7b-all"].routing.scoring == "softmax"


class Replayed:
    """A graph that runs its work at each replay."""

    def __init__(self, work):
        self.replay = work


@pytest.fixture
def on_cpu(monkeypatch):
    """The whole run on CPU tensors; every implementation is the loop over experts, unless a test puts another one in
    its place.
    """
    from benchmarks.kernels import peers as kernels_peers
    from benchmarks.kernels import timing as kernels_timing

    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    monkeypatch.setattr(kernels, "LAYERS", {"small": LAYER, "deepseek-v3": LAYER})
    monkeypatch.setattr("benchmarks.kernels.cases.LAYERS", kernels.LAYERS)
    for name, value in (
        ("is_available", True),
        ("get_device_name", "a card"),
        ("empty_cache", None),
        ("get_device_capability", (8, 0)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(kernels_timing, "roofline", lambda: {"tflops": 700.0, "copy_tbps": 4.0})
    monkeypatch.setattr(kernels_timing, "captured", Replayed)
    monkeypatch.setattr(kernels_timing, "host_us", lambda call: call() or 30.0)
    monkeypatch.setattr(
        kernels_timing, "interleaved_ms", lambda graphs, rounds: {name: [1.0, 2.0, 3.0] for name in graphs}
    )
    peers = dict.fromkeys(kernels_peers.PEERS, lambda weights, rows, _: kernels_peers.cublas_loop(weights, rows))
    monkeypatch.setattr(kernels_peers, "PEERS", peers)
    return peers


def run(tmp_path, *arguments):
    path = tmp_path / "kernels.json"
    options = ["--layers", "small,deepseek-v3", "--tokens", "30", "--json", str(path), *arguments]
    return kernels.run(kernels.parse(options)), json.loads(path.read_text())["rows"]


def test_a_whole_run(on_cpu, tmp_path, capsys):
    status, rows = run(tmp_path, "--impls", "pipemoe,pipemoe_fp8,cublas_loop")
    assert status == 0 and [(row["layer"], row["impl"], row["dtype"]) for row in rows] == [
        ("small", "pipemoe", "bf16"),
        ("small", "cublas_loop", "bf16"),
        ("deepseek-v3", "pipemoe", "bf16"),
        ("deepseek-v3", "pipemoe", "fp8"),
        ("deepseek-v3", "cublas_loop", "bf16"),
    ]
    assert all(
        row["ms"] == 2.0
        and row["rel_err"] < 1e-2
        and row["host_us"] == (30.0 if row["impl"] == "pipemoe" and row["dtype"] == "bf16" else None)
        for row in rows
    )
    printed = capsys.readouterr().out
    assert "a card: dense bf16 700" in printed and "host, eager call: us" in printed and "bars met" in printed
    assert json.loads(printed.splitlines()[-1])["benchmark"] == "kernels"


def test_implementations_that_fail_leave_rows_without_figures(on_cpu, tmp_path, capsys):
    def raises(weights, rows, num_experts):
        raise RuntimeError("no kernel for this")

    on_cpu |= {"grouped_mm": raises, "cublas_loop": lambda weights, rows, num_experts: lambda out: out.zero_()}
    status, rows = run(tmp_path, "--impls", "pipemoe,grouped_mm,cublas_loop")
    assert status == 0 and [row["ms"] for row in rows] == 2 * [2.0, None, None]
    assert "no kernel for this" in (errors := capsys.readouterr().err) and "relative error" in errors
    on_cpu["pipemoe"] = raises
    assert run(tmp_path, "--impls", "pipemoe,grouped_mm")[0] == 1


def test_late_peers_are_left_out(on_cpu, tmp_path):
    rows = run(tmp_path, "--impls", "pipemoe,cublas_loop", "--seconds", "1e-9")[1]
    assert [row["ms"] for row in rows] == 2 * [2.0, None]


def cell_rows(speed=1.0, **changes):
    """Rows of all cells of the field, `speed` times as fast as its best, on a card with its floors."""
    rows = []
    for (name, tokens), best in FIELD.items():
        layer, ratio = LAYERS[name], best.ratio_to_floor / speed
        row = result(
            "pipemoe",
            ratio * best.floor_ms,
            tokens,
            layer=name,
            H=layer.hidden,
            floor_ms=best.floor_ms,
            ratio_to_floor=ratio,
        )
        rows.append(row | {"tflops": 650.0, "index_us": 2.0, "routing_us": 2.0} | changes)
    return rows


def verdicts(rows):
    return {verdict.bar: verdict for verdict in kernels_judge.judge(rows)}


def test_bars_are_those_of_the_field():
    found = verdicts(cell_rows(1.2) + [result("pipemoe", 1.2, 16384, layer="deepseek-v3", dtype="fp8", tflops=1200.0)])
    not_met = [bar for bar, verdict in found.items() if not verdict.met]
    # the field's best is 1.46 times the floor there
    assert not_met == ["mixtral-8x7b-all, 512 tokens: memory-bound, ratio to floor"]
    assert found["geometric mean against the best of the field"].found == "1.200 over 20 cells"
    assert found["deepseek-v3, 4096 tokens: ratio to floor"].found == "1.278, 1.20 x as fast"
    assert found["fp8, deepseek-v3, 16384 tokens: x bf16"].found == "2.00"
    assert kernels_judge.verdict_table(list(found.values())).endswith(f"{len(found) - 1} of {len(found)} bars met")


def test_bars_that_are_not_met_or_not_measured():
    slow = verdicts(cell_rows(1 / 1.04, tflops=400.0, host_us=41.0, routing_us=90.0))
    assert not any(verdict.met for bar, verdict in slow.items() if "memory-bound" not in bar)
    assert slow["fp8, deepseek-v3, 16384 tokens: x bf16"].found is None
    few = verdicts(cell_rows(2.0)[:3])
    assert (
        not few["geometric mean against the best of the field"].met
        and few["deepseek-v3, 64 tokens: ratio to floor"].met
    )
    assert few["deepseek-v3, 16384 tokens: ratio to floor"].found is None
    failed = verdicts([row | {"ms": None, "tflops": None, "ratio_to_floor": None} for row in cell_rows()])
    assert not any(verdict.met for verdict in failed.values())
