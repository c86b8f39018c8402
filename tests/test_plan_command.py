"""`pipemoe plan`: what it prints and writes, without GPU, MPI or model."""

import json
import re
import subprocess
import sys

import pytest

from pipemoe.cli import main
from pipemoe.errors import InputError
from pipemoe.plan.cost import CostModel
from pipemoe.plan.cost_file import write_cost
from pipemoe.plan.model_configs import MODEL_CONFIGS
from pipemoe.plan_command import parse_facts

SKEWED = ["--ranks", "8", "--rank-tokens", "4096,16,16,16,16,16,16,16", "--layers", "6"]


def test_report(capsys, tmp_path):
    trace = tmp_path / "trace.json"
    assert main(["plan", "--model", "deepseek-v3", "--gpu", "h200", *SKEWED, "--pareto", "--trace", str(trace)]) == 0
    text = capsys.readouterr().out
    for wanted in ("one cohort", "<- chosen", "slowest", "MiB per rank", "exposed comm ms", "makespan budget", "20 %", "a attend"):
        assert wanted in text
    assert len(re.findall(r"^\d +(?:4096|16) ", text, re.MULTILINE)) == 8
    events = json.loads(trace.read_text())["traceEvents"]
    assert {e["pid"] for e in events} == set(range(8)) and {"attend", "dispatch", "experts", "combine", "finish"} <= {e["name"] for e in events}


def test_waves_computed_as_they_arrive(capsys):
    shape = ["--rank-tokens", "100,300,200,50,0,700,60,80", "--layers", "3", "--mode", "chunked"]
    for setting, wanted in (("on", True), ("off", False)):
        assert main(["plan", *shape, "--arrivals", setting]) == 0
        assert ("waves computed as they arrive, dispatched in up to 3 groups" in capsys.readouterr().out) == wanted


def test_waves_computed_as_they_arrive_are_priced_at_their_measured_speed(capsys):
    """Experts that gather rows are slower than calls on whole waves, by more than a quick exchange could give them."""
    mean = {}
    for setting in ("on", "off"):
        assert main(["plan", "--rank-tokens", "4000,4000", "--layers", "3", "--mode", "chunked", "--arrivals", setting]) == 0
        mean[setting] = float(re.search(r"mean TTFT ([\d.]+) ms", capsys.readouterr().out).group(1))
    assert mean["on"] > 1.05 * mean["off"]


@pytest.mark.parametrize("model", MODEL_CONFIGS)
@pytest.mark.parametrize("mode", ["auto", "padded", "per_rank"])
def test_all_models_and_modes(capsys, model, mode):
    assert main(["plan", "--model", model, "--gpu", "b200", "--ranks", "4", "--rank-tokens", "300", "--mode", mode, "--layers", "3"]) == 0
    assert "mean TTFT" in capsys.readouterr().out


def test_multiprocessors_left(capsys):
    waves = ["plan", "--model", "small", "--ranks", "4", "--rank-tokens", "300", "--moe-max-num-tokens", "400", "--mode", "chunked"]
    assert main(waves) == 0
    assert "experts leave 13 multiprocessors to collectives" in capsys.readouterr().out
    assert main([*waves, "--num-sms", "100"]) == 0
    assert "experts leave 32 multiprocessors to collectives" in capsys.readouterr().out
    assert main([*waves, "--num-sms", "133"]) != 0
    assert "num_sms is 133, but the experts' kernels can fill 132" in capsys.readouterr().err


def test_a_step_without_tokens(capsys):
    assert main(["plan", "--rank-tokens", "0,0", "--layers", "3"]) == 0
    assert "over 0 sequences" in capsys.readouterr().out


def test_measured_costs_are_used(capsys, tmp_path):
    path = tmp_path / "cost.json"
    write_cost(path, {"device": "any"}, CostModel())
    assert main(["plan", "--cost", str(path), *SKEWED]) == 0
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank-tokens", "1,2", "--ranks", "3"], "for 2 ranks, but --ranks is 3"),
        (["--rank-tokens", "1,x"], "whole numbers"),
        (["--rank-tokens", "1,-2"], "positive"),
        (["--rank-tokens", "9", "--max-tokens-per-rank", "8"], "max_tokens_per_rank=8"),
        (["--rank-tokens", "1", "--model", "missing.json"], "missing.json"),
        (["--rank-tokens", "1", "--cost", "missing.json"], "missing.json"),
        (["--rank-tokens", "1", "--makespan-budget", "-1"], "makespan_budget"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("pipemoe plan: ") and error.count("\n") == 1


def test_rank_tokens():
    assert parse_facts("512+16,0,3").lengths == ((512, 16), (), (3,))
    assert parse_facts("7", 2).lengths == ((7,), (7,))
    with pytest.raises(InputError):
        parse_facts("")


def test_planning_needs_neither_torch_nor_mpi():
    code = "import sys, pipemoe.plan.planner, pipemoe.plan.report, pipemoe.plan.fit; print([m for m in ('torch', 'mpi4py', 'cupy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
