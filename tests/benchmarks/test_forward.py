"""The forward benchmark end to end on a tiny model: this pipemoe beside itself and beside a stand-in for vLLM.

A server of pipemoe takes many seconds to start. Where a test is about another one, a stand-in takes its place.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import forward, readme_table, results_schema
from benchmarks.visits import phases_of
from benchmarks.vllm_peer import RandomTensors
from pipemoe.model_facts.known_models import MODEL_CONFIGS
from pipemoe.models.random_weights import reference_model

CHECKOUT = Path(__file__).resolve().parents[2]
TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 32,
    "num_experts_per_tok": 2,
    "vocab_size": 4096,
}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps({**MODEL_CONFIGS["small"], **TINY}))
    return str(tmp_path / "tiny.json")


# vLLM's names as far as vllm_peer.py uses them; its worker takes the weights if `may_copy`.
STAND_IN = """
import asyncio, time
from types import SimpleNamespace
__version__ = "0.0"
class SamplingParams:
    def __init__(self, **greedy):
        assert greedy["max_tokens"] == 1 and greedy["temperature"] == 0.0
class AsyncEngineArgs(SimpleNamespace):
    pass
class AsyncLLM:
    from_engine_args = classmethod(lambda cls, arguments: cls(arguments))
    def __init__(self, arguments):
        assert arguments.max_model_len == 256 and arguments.load_format == "dummy"
        assert arguments.worker_extension_cls == "benchmarks.vllm_peer.PipemoeWeights"
    async def collective_rpc(self, method, timeout, arguments):
        assert method == "take_pipemoe_weights"
        raw, seed, router_skew = arguments
        if not {may_copy}:
            raise RuntimeError("other names")
        return [f"pipemoe's, seed {{seed}}, router skew {{router_skew:g}}"]
    async def generate(self, prompt, params, name):
        assert len(prompt["prompt_token_ids"]) in (1, 40)
        yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[])], metrics=None)
        await asyncio.sleep(0)
        metrics = SimpleNamespace(scheduled_ts=5.0, first_token_ts=5.5)
        yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[-7])], metrics=metrics)
    def shutdown(self):
        pass
"""


def vllm_site(tmp_path, *, may_copy):
    site = tmp_path / "site"
    for folder in ("vllm", "vllm/engine", "vllm/v1", "vllm/v1/engine"):
        (site / folder).mkdir(parents=True)
        (site / folder / "__init__.py").write_text("")
    (site / "vllm/__init__.py").write_text(STAND_IN.format(may_copy=may_copy))
    (site / "vllm/engine/arg_utils.py").write_text("from vllm import AsyncEngineArgs\n")
    (site / "vllm/v1/engine/async_llm.py").write_text("from vllm import AsyncLLM\n")
    return site


def test_rows_of_every_implementation_that_is_there(model, tmp_path, capsys):
    out = tmp_path / "out" / "forward.json"
    asked = ["--model", model, "--device", "cpu", "--tokens", "1,40", "--rounds", "2", "--warm-up", "1"]
    asked += ["--before", str(CHECKOUT), "--vllm", "--vllm-path", str(vllm_site(tmp_path, may_copy=True))]
    status = forward.main([*asked, "--json", str(out)])
    told = capsys.readouterr()
    assert status == 0, told.err
    document = results_schema.read_results(out)
    assert document == json.loads(told.out.splitlines()[-1])
    order = "pipemoe pipemoe_before vllm vllm pipemoe_before pipemoe"
    rows = document["rows"]
    assert [(row["impl"], row["tokens"]) for row in rows] == [
        (impl, tokens) for tokens in (1, 40) for impl in ("pipemoe", "pipemoe_before", "vllm")
    ]
    assert all(row["order"] == order and row["rounds"] == len(row["ttfts_ms"]) == 4 for row in rows)
    for ours, theirs in zip(rows[::3], rows[2::3]):
        assert theirs["ttft_ms"] == 500 and theirs["client_ttft_ms"] > 0 and theirs["issue_us_per_layer"] is None
        assert theirs["weights"] == ours["weights"] and theirs["routing_of"] == "pipemoe"
        assert theirs["active_experts"] == ours["active_experts"] and theirs["same_first_tokens"] == 0
    assert rows[0]["active_experts"] == 2
    rows = [row for row in rows if row["impl"] != "vllm"]
    for row in rows:
        assert row["num_ranks"] == 1 and row["layers"] == 2
        assert 0 < row["ttft_ms_least"] <= row["ttft_ms"] <= row["ttft_ms_most"]
        assert row["issue_us_per_layer"] > 0 and row["predicted_ttft_ms"] > 0 and row["sm_clock_mhz"] is None
        assert row["active_experts"] == pytest.approx(row["active_experts_expected"], rel=0.15)
        assert row["expert_load_max_over_mean"] >= 1
        assert row["same_first_tokens"] == (None if row["impl"] == "pipemoe" else 1)
    table = readme_table.markdown_table(document)
    assert "| pipemoe_before | 40 |" in table and f"order {order}" in table
    heading, line = table.splitlines()[0], table.splitlines()[3]
    ratio = dict(zip(heading.split(" | "), line.split(" | ")))["pipemoe / it"]
    assert float(ratio) == pytest.approx(rows[0]["ttft_ms"] / rows[1]["ttft_ms"], abs=1e-3)


# In place of the launcher of benchmarks/pipemoe_server.py: its words are this script's arguments. It imports the
# pipemoe that it is told to serve, and answers as a server would.
QUICK_SERVER = """
import sys
sys.path.append({checkout!r})
from benchmarks.case_server import Answers, serve
answers = Answers()
import pipemoe
figures = dict(num_experts=32, top_k=2, active_experts=2.0, expert_load_max_over_mean=1.0, issue_us_per_layer=3.0)
figures["predicted_ttft_ms"] = 1.0
def answer_to(request):
    if request.get("figures"):
        return figures
    rounds = request["rounds"]
    tokens, times = [[7]] * rounds, [[2.5]] * rounds
    return dict(ttft_ms=[2.5] * rounds, rank_ttft_ms=times, first_tokens=tokens, issue_us=[3.0] * rounds)
answers.send(dict(num_ranks=1, device="cpu", mode="broadcast"))
serve(answers, answer_to)
"""


@pytest.fixture
def quick(tmp_path):
    """Options under which pipemoe's servers are quick."""
    script = tmp_path / "quick_server.py"
    script.write_text(QUICK_SERVER.format(checkout=str(CHECKOUT)))
    options = ["--device", "cpu", "--tokens", "1,40", "--rounds", "1", "--warm-up", "1"]
    return [*options, "--launcher", f"{sys.executable} {script}"]


def test_vllm_with_weights_of_its_own_routes_in_its_own_way(model, tmp_path, quick, capsys):
    out = tmp_path / "forward.json"
    site = vllm_site(tmp_path, may_copy=False)
    asked = ["--model", model, *quick, "--vllm", "--vllm-path", str(site), "--json", str(out)]
    assert forward.main(asked) == 0, capsys.readouterr().err
    ours, theirs, *more = results_schema.read_results(out)["rows"]
    assert [row["impl"] for row in more] == ["pipemoe", "vllm"] and theirs["order"] == "pipemoe vllm vllm pipemoe"
    assert ours["ttft_ms"] == 2.5 and ours["active_experts"] == 2 and theirs["rounds"] == 2
    assert "other names" in theirs["weights"] and theirs["routing_of"] == "vllm"
    assert theirs["active_experts"] is None and theirs["same_first_tokens"] is None


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM would start")
def test_a_vllm_that_is_not_installed_is_left_out(model, tmp_path, quick, capsys):
    out = tmp_path / "forward.json"
    assert forward.main(["--model", model, *quick, "--vllm", "--json", str(out)]) == 0
    assert "vllm: vLLM is not installed" in capsys.readouterr().err
    assert [row["impl"] for row in results_schema.read_results(out)["rows"]] == ["pipemoe"] * 2


def test_an_implementation_that_cannot_start_is_named(model, tmp_path, quick, capsys):
    """Here: a tree of pipemoe that raises when it is imported."""
    (tmp_path / "broken" / "pipemoe").mkdir(parents=True)
    (tmp_path / "broken" / "pipemoe" / "__init__.py").write_text("raise SystemExit(9)\n")
    asked = ["--model", model, *quick, "--json", str(tmp_path / "f.json")]
    assert forward.main([*asked, "--before", str(tmp_path / "broken")]) == 1
    assert "pipemoe_before: pipemoe_before: ended with status 9" in capsys.readouterr().err
    assert [row["impl"] for row in results_schema.read_results(tmp_path / "f.json")["rows"]] == ["pipemoe"] * 2


def test_builds_of_several_ranks_have_a_time_for_each(model, tmp_path, capsys):
    """A rank has no prompt in one case; waves are smaller than a case."""
    out = tmp_path / "forward.json"
    asked = ["--model", model, "--device", "cpu", "--num-ranks", "2", "--rounds", "2", "--warm-up", "1"]
    asked += ["--rank-tokens", "30,2", "--rank-tokens", "0,5", "--tokens", "3", "--moe-max-num-tokens", "16"]
    status = forward.main([*asked, "--before", str(CHECKOUT), "--json", str(out)])
    told = capsys.readouterr()
    assert status == 0, told.err
    rows = results_schema.read_results(out)["rows"]
    assert [(row["impl"], row["tokens"]) for row in rows] == [
        (impl, tokens) for tokens in (3, 30, 5) for impl in ("pipemoe", "pipemoe_before")
    ]
    for row in rows:
        assert row["num_ranks"] == 2 and row["mode"] == "auto" and row["moe_max_num_tokens"] == 16
        ranks = [rank for rank, tokens in enumerate(row["rank_tokens"]) if tokens]
        assert [rank for rank, ms in enumerate(row["rank_ttft_ms"]) if ms is not None] == ranks
        assert row["ttfts_ms"] == [max(ms[rank] for rank in ranks) for ms in row["rank_ttfts_ms"]]
        assert len(row["ttfts_ms"]) == 4 and row["same_first_tokens"] == (None if row["impl"] == "pipemoe" else 1)
        assert row["median_rank_ttft_ms"] <= row["ttft_ms_most"]
    lines = [dict(zip(cells[0], line)) for cells in [forward.forward_cells(rows)] for line in cells[1:]]
    assert [line["tokens"] for line in lines[::2]] == ["3", "30, 2", "0, 5"]
    assert lines[0]["median ranks"] == "-" and float(lines[1]["median ranks"]) > 0


def test_servers_end_with_a_benchmark_that_is_terminated(model, tmp_path):
    """Here one that never gets ready; its input does not end it."""
    server = f"bash -c 'echo $$ >{tmp_path}/number.part; mv {tmp_path}/number.part {tmp_path}/number; exec sleep 600'"
    command = [sys.executable, str(CHECKOUT / "benchmarks" / "forward.py"), "--model", model, "--device", "cpu"]
    command += ["--launcher", server, "--json", str(tmp_path / "f.json")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr and "starting pipemoe" in process.stderr.readline()
    while not (tmp_path / "number").exists():
        assert process.poll() is None
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "number").read_text()), 0)


@pytest.mark.parametrize(
    "bad",
    [
        *(["--tokens", "1,x"], ["--tokens", "0"], ["--before", "/nowhere"], ["--rounds", "0"], ["--at-once", "0"]),
        *(["--rank-tokens", "1,2"], ["--rank-tokens", "0"], ["--rank-tokens", "0", "--vllm"]),
    ],
)
def test_bad_options_are_named(bad, capsys):
    with pytest.raises(SystemExit) as raised:
        forward.parse(bad)
    assert raised.value.code == 2 and bad[0] in capsys.readouterr().err


def test_phases_hold_what_fits_and_compare_the_first_with_each():
    impls = ["pipemoe", "pipemoe_before", "vllm"]
    assert phases_of(impls, 5) == phases_of(impls, 3) == [impls]
    assert phases_of(impls, 2) == [["pipemoe", "pipemoe_before"], ["pipemoe", "vllm"]]
    assert phases_of(impls, 1) == phases_of(impls, 0) == [[impl] for impl in impls]
    assert phases_of(impls[:1], 0) == [["pipemoe"]]


def test_vllms_parameters_get_the_reference_models_values():
    """By name and layout: attention's three projections and each expert's two stand side by side."""
    raw = {**MODEL_CONFIGS["small"], **TINY}
    tensors = RandomTensors(raw, 3, 0.5, torch.device("cpu"))
    wanted = reference_model(raw, "cpu", torch.float32, 3, random_weights=True, router_skew=0.5).state_dict()
    layer = "model.layers.1."
    qkv = torch.cat([wanted[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv"])
    for name, value in {
        f"{layer}self_attn.qkv_proj.weight": qkv,
        f"{layer}mlp.experts.w13_weight": wanted[f"{layer}mlp.experts.gate_up_proj"],
        f"{layer}mlp.experts.routed_experts.w2_weight": wanted[f"{layer}mlp.experts.down_proj"],
        **{
            name: wanted[name]
            for name in (
                *("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"),
                *(f"{layer}mlp.gate.weight", f"{layer}self_attn.o_proj.weight", f"{layer}input_layernorm.weight"),
            )
        },
    }.items():
        assert torch.equal(tensors.of(name, torch.empty(value.shape)), value), name
    with pytest.raises(ValueError, match=r"w13_weight is \(32, 64, 65\), pipemoe's \(32, 64, 64\)"):
        tensors.of(f"{layer}mlp.experts.w13_weight", torch.empty(32, 64, 65))
