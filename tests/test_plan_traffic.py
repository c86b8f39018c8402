"""`pipemoe plan --trace-arrivals`: requests over time without GPU, MPI or model."""

import json

import pytest

from pipemoe.cli import main

HEADER = "timestamp_ms,input_tokens,output_tokens\n"


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "some.csv"
    path.write_text(HEADER + "".join(f"{40 * n},{100 + 37 * n % 900},1\n" for n in range(60)))
    return path


def words(trace, *more):
    shape = ["plan", "--model", "qwen3-30b-a3b", "--layers", "6", "--ranks", "4", "--trace-arrivals", str(trace)]
    return [*shape, "--num-requests", "30", "--step-tokens", "1024", "--loads", "0.5,0.8", "--rate-step", "1.2", *more]


def test_report(trace, capsys):
    assert main(words(trace, "--policies", "rolling,lockstep")) == 0
    text = capsys.readouterr().out
    assert text.startswith("qwen3-30b-a3b on 4 ranks of h200, 6 MoE layers, some\n")
    lines = text.splitlines()
    assert (
        sum(line.startswith("rolling ") for line in lines)
        == 4
        == sum(line.startswith("lockstep 1024") for line in lines)
    )
    assert "capacity: requests a second of which 95 % have a first token within" in lines[-1]
    assert lines[-2] == "rolling: in 2 slots, the short ones beside long rounds only"


@pytest.mark.parametrize(("ranks", "more", "slots"), [(1, [], 1), (4, [], 2), (1, ["--slots", "2"], 2)])
def test_how_many_slots_roll(trace, capsys, ranks, more, slots):
    assert main(words(trace, "--json", "--ranks", str(ranks), "--policies", "rolling", *more)) == 0
    assert json.loads(capsys.readouterr().out)["rolling_slots"] == slots


def test_slots_that_serve_at_all_times(trace, capsys):
    assert main(words(trace, "--policies", "rolling", "--ranks-per-gpu", "4")) == 0
    assert capsys.readouterr().out.splitlines()[-2] == "rolling: in 2 slots"
    assert main(words(trace, "--policies", "rolling", "--ranks-per-gpu", "4", "--slots", "1")) == 0
    assert capsys.readouterr().out.splitlines()[-2] == "rolling: in 1 slot"


def test_no_slot_rolls_in_lockstep(trace, capsys):
    assert main(words(trace, "--policies", "lockstep")) == 0
    assert "rolling" not in capsys.readouterr().out
    assert main(words(trace, "--json", "--policies", "lockstep")) == 0
    assert json.loads(capsys.readouterr().out)["rolling_slots"] is None


def test_capacity_within_given_limits(trace, capsys):
    more = "--policies", "rolling", "--limits-ms", "50,60.5,70"
    assert main(words(trace, *more)) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "within 50 ms for up to " in last and ", 60 ms for up to " in last and ", 70 ms for more" in last


def test_json(trace, capsys):
    assert main(words(trace, "--json", "--seeds", "0,1", "--request-times", "on_off", "--slots", "2")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["trace"], found["num_ranks"]) == ("qwen3-30b-a3b", "some", 4)
    assert set(found["limits_ms"]) == {"short", "medium", "long"} and all(v > 0 for v in found["limits_ms"].values())
    loads = [row for row in found["rows"] if row["what"] == "load"]
    assert {row["seed"] for row in loads} == {0, 1} and {row["load"] for row in loads} == {0.5, 0.8}
    assert all(row["completed"] == row["requests"] == 30 and row["arrivals"] == "on_off" for row in loads)
    assert main(words(trace, "--json", "--seeds", "0,1", "--request-times", "on_off", "--slots", "2")) == 0
    assert json.loads(capsys.readouterr().out) == found  # the same again


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        (["--policies", "eager"], "policy 'eager'"),
        (["--slots", "65"], "--slots 65: a world has at most 64"),
        (["--step-tokens", "many"], "--step-tokens 'many'"),
        (["--seeds", "-1"], "--seeds '-1'"),
        (["--seeds", "9"], "cannot take 30 requests from number 270"),
        (["--too-long", "error", "--most-tokens", "200"], "more than 200 input tokens"),
        (["--max-tokens-per-rank", "512"], "step_tokens is 1024, more than max_tokens_per_rank=512"),
        (["--loads", "0"], "--loads '0': shares of the throughput are wanted"),
        (["--rate-step", "1"], "--rate-step 1.0: must be over 1"),
        (["--rate-step", "nan"], "--rate-step nan: must be over 1"),
        (["--loads", "0.5,70"], "--loads '0.5,70': shares of the throughput"),
        (["--limits-ms", "100,200"], "--limits-ms '100,200': limits of 100.0, 200.0 ms: one over 0 is wanted"),
        (["--limits-ms", "100,200,long"], "--limits-ms '100,200,long'"),
    ],
)
def test_bad_options(trace, capsys, more, wrong):
    assert main(words(trace, *more)) == 2
    assert wrong in capsys.readouterr().err


def test_it_needs_ranks_and_no_step(trace, capsys):
    assert main(["plan", "--trace-arrivals", str(trace)]) == 2
    assert "--trace-arrivals needs --ranks" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(words(trace, "--rank-tokens", "5"))
    assert "not allowed with" in capsys.readouterr().err
