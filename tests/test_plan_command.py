"""`pipemoe plan`: what it prints and writes, without GPU, MPI or model."""

import json
import re
import subprocess
import sys

import pytest
import torch

from pipemoe.cli import main
from pipemoe.config import Config
from pipemoe.errors import InputError
from pipemoe.model_facts.dimensions import dimensions_of
from pipemoe.model_facts.known_models import MODEL_CONFIGS
from pipemoe.plan.cost.file import write_cost
from pipemoe.plan.cost.model import CostModel
from pipemoe.plan_command import parse_facts
from pipemoe.runtime.costs import model_key
from pipemoe.runtime.workspace import shared_layout
from pipemoe.version import __version__
from pipemoe.wire import WireFormat

SKEWED = ["--ranks", "8", "--rank-tokens", "4096,16,16,16,16,16,16,16", "--layers", "6"]


def test_report(capsys, tmp_path):
    trace = tmp_path / "trace.json"
    assert main(["plan", "--model", "deepseek-v3", "--gpu", "h200", *SKEWED, "--pareto", "--trace", str(trace)]) == 0
    text = capsys.readouterr().out
    for wanted in (
        "one cohort",
        "<- chosen",
        "slowest",
        "MiB per rank",
        "exposed comm ms",
        "makespan budget",
        "20 %",
        "a attend",
    ):
        assert wanted in text
    assert len(re.findall(r"^\d +(?:4096|16) ", text, re.MULTILINE)) == 8
    events = json.loads(trace.read_text())["traceEvents"]
    assert {e["pid"] for e in events} == set(range(8)) and {"attend", "dispatch", "experts", "combine", "finish"} <= {
        e["name"] for e in events
    }


def test_memory_that_ranks_of_one_host_share_is_what_a_runtime_allocates(capsys):
    config = Config(moe_max_num_tokens=96, max_tokens_per_rank=300, num_slots=3)
    host = ["plan", "--model", "small", "--cores", "2", "--rank-tokens", "300,16,16,16", "--slots", "3"]
    host += ["--moe-max-num-tokens", "96", "--max-tokens-per-rank", "300"]
    assert main([*host, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = shared_layout(config, WireFormat(128, 4, torch.float32), torch.float32, 4).num_bytes
    assert found["shared_bytes"] == found["exchange_bytes"] == wanted
    assert main(host) == 0
    words = f"shared memory {wanted / 2**20:.1f} MiB per rank, {4 * wanted / 2**20:.1f} MiB in all"
    assert words in capsys.readouterr().out
    assert main([*host[:5], "--rank-tokens", "300", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shared_bytes"] == 0
    assert main([*host, "--cost", "some.json"]) != 0


@pytest.mark.parametrize("model", MODEL_CONFIGS)
@pytest.mark.parametrize("mode", ["auto", "padded", "per_rank"])
def test_all_models_and_modes(capsys, model, mode):
    assert (
        main(
            [
                "plan",
                "--model",
                model,
                "--gpu",
                "b200",
                "--ranks",
                "4",
                "--rank-tokens",
                "300",
                "--mode",
                mode,
                "--layers",
                "3",
            ]
        )
        == 0
    )
    assert "mean TTFT" in capsys.readouterr().out


def test_multiprocessors_left(capsys):
    waves = [
        "plan",
        "--model",
        "small",
        "--ranks",
        "4",
        "--rank-tokens",
        "300",
        "--moe-max-num-tokens",
        "400",
        "--mode",
        "chunked",
    ]
    assert main(waves) == 0
    assert "experts leave 13 multiprocessors to collectives" in capsys.readouterr().out
    assert main([*waves, "--num-sms", "100"]) == 0
    assert "experts leave 32 multiprocessors to collectives" in capsys.readouterr().out
    assert main([*waves, "--num-sms", "133"]) != 0
    assert "num_sms is 133, but the experts' kernels can fill 132" in capsys.readouterr().err


def test_a_step_without_tokens(capsys):
    assert main(["plan", "--rank-tokens", "0,0", "--layers", "3"]) == 0
    assert capsys.readouterr().out == "nothing to plan: no rank has a token\n"


@pytest.fixture
def small_cost(tmp_path):
    """Path of a cost file of the small model on 8 ranks of a CPU."""
    path = tmp_path / "cost.json"
    write_cost(
        path, {"device": "cpu", "num_ranks": 8, "model": model_key(dimensions_of(MODEL_CONFIGS["small"]))}, CostModel()
    )
    return str(path)


def test_measured_costs_are_used(capsys, small_cost):
    assert main(["plan", "--model", "small", "--cost", small_cost, *SKEWED]) == 0
    assert small_cost in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (SKEWED, "say which with --model"),
        (["--model", "mixtral-8x7b", *SKEWED], "measured with model small, "),
        (["--model", "small", "--gpu", "h100", *SKEWED], "--gpu means nothing with --cost"),
        (
            ["--model", "small", "--rank-tokens", "5,3"],
            "measured with num_ranks 8, but --ranks and --rank-tokens say 2",
        ),
    ],
)
def test_costs_of_something_else_are_refused(capsys, small_cost, arguments, message):
    assert main(["plan", "--cost", small_cost, *arguments]) == 2
    out, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and not out


def test_a_folder_with_a_config_is_a_model(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL_CONFIGS["small"]))
    assert main(["plan", "--model", str(tmp_path), "--rank-tokens", "5,3"]) == 0
    (tmp_path / "config.json").write_text("{")
    assert main(["plan", "--model", str(tmp_path), "--rank-tokens", "5,3"]) == 2
    assert "config.json is no JSON" in capsys.readouterr().err


def test_the_rule_is_said_and_why_figures_differ(capsys):
    rule = "at most 25 % above the least; predictions are inexact, so each extra cohort must buy 3 %"
    differ = "so they differ a little"
    assert main(["plan", "--model", "small", "--rank-tokens", "512,64", "--layers", "3"]) == 0
    text = capsys.readouterr().out
    assert rule in text and differ not in text
    assert (
        main(
            [
                "plan",
                "--model",
                "qwen3-30b-a3b",
                "--rank-tokens",
                "4096,16,16,16,16,16,16,16",
                "--makespan-budget",
                "1",
                "--pareto",
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert (
        text.count(differ) == 2
        and "at most 100 % above the least" in text
        and "at most the line's budget above the least" in text
    )


def test_a_reader_that_goes_away_is_no_error():
    command = (
        f"{sys.executable} -m pipemoe.cli plan --model small --rank-tokens 5,3 --layers 3 --width 100000 | head -n 1"
    )
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout.startswith("small on 2 ranks") and not result.stderr


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"pipemoe {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank-tokens", "1,2", "--ranks", "3"], "for 2 ranks, but --ranks is 3"),
        (["--rank-tokens", "1,x"], "whole numbers"),
        (["--rank-tokens", "1,-2"], "positive"),
        (["--rank-tokens", "-5,3"], "must all be positive"),
        (["--rank-tokens", "100000000000,20"], "at most 10000000"),
        (["--rank-tokens", "5", "--trace", "/missing/trace.json"], "/missing does not exist"),
        (["--rank-tokens", "5", "--trace", "."], "is a directory"),
        (["--rank-tokens", "5", "--trace", __file__], "holds no timeline now; --trace-arrivals reads requests"),
        (["--rank-tokens", "5", "--model", "."], "config.json: No such file"),
        (["--rank-tokens", "9", "--max-tokens-per-rank", "8"], "max_tokens_per_rank=8"),
        (
            ["--rank-tokens", "16,100000+163841"],
            "rank 1 has a sequence of 163841 tokens, but deepseek-v3 has positions for 163840",
        ),
        (["--rank-tokens", "3000000"], "rank 0 has a sequence of 3000000 tokens"),
        (["--rank-tokens", "32769", "--model", "small"], "small has positions for 32768"),
        (["--rank-tokens", "1", "--model", "missing.json"], "missing.json"),
        (["--rank-tokens", "1", "--model", "small", "--cost", "missing.json"], "missing.json"),
        (["--rank-tokens", "1", "--makespan-budget", "-1"], "makespan_budget"),
        (["--rank-tokens", "1,1", "--cores", "2", "--gpu", "h100"], "--gpu means nothing with --cores 2"),
        (
            ["--rank-tokens", "1,1", "--cores", "2", "--ranks-per-gpu", "2"],
            "--ranks-per-gpu means nothing with --cores 2",
        ),
        (["--rank-tokens", "1", "--loads", "0.5"], "--loads means nothing without --trace-arrivals"),
        (["--rank-tokens", "1", "--limits-ms", "1,2,3"], "--limits-ms means nothing without --trace-arrivals"),
        (["--trace-arrivals", "t.csv", "--ranks", "2", "--pareto"], "--pareto means nothing with --trace-arrivals"),
        (
            ["--trace-arrivals", "t.csv", "--ranks", "2", "--mode", "padded"],
            "--mode means nothing with --trace-arrivals",
        ),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert main(["plan", *arguments]) == 2
    out, error = capsys.readouterr()
    assert message in error and error.startswith("pipemoe plan: ") and error.count("\n") == 1 and not out


def test_rank_tokens():
    assert parse_facts("512+16,0,3").lengths == ((512, 16), (), (3,))
    assert parse_facts("7", 2).lengths == ((7,), (7,))
    with pytest.raises(InputError):
        parse_facts("")


def test_planning_needs_neither_torch_nor_mpi():
    code = "import sys, pipemoe.plan.planner, pipemoe.plan_report, pipemoe.tune.fit\n"
    code += "print([m for m in ('torch', 'mpi4py', 'cupy') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_the_same_figures_as_one_document(capsys):
    arguments = ["plan", "--model", "Qwen3-30B-A3B", "--gpu", "H200", *SKEWED, "--pareto"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert f"mean TTFT {document['mean_ttft_ms']:.2f} ms, slowest {document['slowest_ttft_ms']:.2f} ms" in text
    assert [rank["tokens"] for rank in document["ranks"]] == [4096] + 7 * [16]
    for rank, of_rank in enumerate(document["ranks"]):
        figures = [str(rank), str(of_rank["tokens"]), f"{of_rank['ttft_ms']:.2f}", f"{of_rank['exposed_comm_ms']:.2f}"]
        assert re.search("^" + " +".join(map(re.escape, figures)) + "$", text, re.MULTILINE)
    chunks = [chunk for cohort in document["cohorts"] for chunk in cohort["chunks"]]
    assert sum(chunk["stop"] - chunk["start"] for chunk in chunks) == 4096 + 7 * 16
    (chosen,) = (c for c in document["candidates"] if c["chosen"])
    assert chosen["cohorts"] == len(document["cohorts"])
    assert all(c["name"] in text for c in document["candidates"])
    assert [line["makespan_budget_percent"] for line in document["front"]] == [0, 2, 5, 10, 15, 20]
    assert main(["plan", "--rank-tokens", "0,0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {}


def test_options_are_written_out(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--rank-tok", "5"])
    assert "--rank-tok" in capsys.readouterr().err


def test_python_m_pipemoe():
    done = subprocess.run([sys.executable, "-m", "pipemoe", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"pipemoe {__version__}\n"
