"""The serve benchmark on 1 to 4 ranks with an engine that answers when it should; and what it says to bad options."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

import pipemoe
from benchmarks import results_schema
from benchmarks.serve import __main__ as serve
from benchmarks.serve.options import parse, requests_of, resolve, settings_of
from pipemoe.errors import ConfigError, InputError
from pipemoe.model_facts.known_models import MODEL_CONFIGS

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 97,
}


class PromptEngine:
    """Says at once when a first token will be there: rolling after 20 us a token, others after 60."""

    opened: list[dict] = []

    def __init__(self, model, **settings):
        self.us = 20 if settings["policy"] == "rolling" else 60
        self.opened.append(settings)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def submit(self, tokens):
        future, now = Future(), time.perf_counter()
        future.set_result(SimpleNamespace(admitted=now, first_token=now + self.us * 1e-6 * len(tokens)))
        return future

    def statistics(self):
        return {}


@pytest.fixture
def arguments(tmp_path):
    """arguments(more...) -> parsed options of a job that takes seconds."""

    def arguments(*more: str):
        (tmp_path / "tiny.json").write_text(json.dumps({**MODEL_CONFIGS["small"], **TINY}))
        small = ["--model", str(tmp_path / "tiny.json"), "--num-requests", "12", "--scale", "0.02", "--seeds", "0"]
        small += ["--step-tokens", "16,64", "--moe-max-num-tokens", "16", "--alone", "1", "--rate-step", "2"]
        return parse([*small, "--device", "cpu", "--out", str(tmp_path / "out"), *more])

    return arguments


@pytest.mark.mpi
def test_all_policies_are_measured_and_reported(world, arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipemoe, "Engine", PromptEngine, raising=False)
    PromptEngine.opened.clear()
    options = arguments("--json", str(tmp_path / "more.json"), "--policies", "rolling,lockstep,lockstep_balanced")
    assert serve.run(world, options) == 0
    assert {(s["policy"], s["step_tokens"]) for s in PromptEngine.opened} >= {("rolling", None), ("lockstep", 16)}
    if world.rank:
        assert capsys.readouterr() == ("", "") and not options.out.exists()
        return
    text = capsys.readouterr().out
    document = json.loads(text.splitlines()[-1])
    results_schema.validate(document)
    assert document == results_schema.read_results(tmp_path / "more.json")
    assert document == results_schema.read_results(options.out / "serve.json")
    rows = document["rows"]
    assert [r["label"] for r in rows if r["what"] == "alone"] == [
        "closed_step",
        "rolling",
        "lockstep 16",
        "lockstep_balanced 16",
    ]
    closed = rows[0]
    assert closed["completed"] == 3 and 0 < closed["ttft_ms_p50"] < 10_000
    loads = [r for r in rows if r["what"] == "load"]
    assert {r["label"] for r in loads if r["seed"] == 0} >= {"rolling", "lockstep 16", "lockstep_balanced 64"}
    assert all(r["completed"] == 12 and r["num_ranks"] == world.size and r["trace"] == "azure2023_conv" for r in loads)
    assert all(r["capacity_tried"][0][0] == r["rate_rps"] for r in loads if r["label"] == "rolling")
    assert "half of all first tokens, seed 0: rolling" in text
    for name in ("serve_azure2023_conv_rates.png", "serve_azure2023_conv_ttft.png"):
        assert (options.out / name).read_bytes().startswith(b"\x89PNG")
    spans = json.loads((options.out / "timeline_azure2023_conv_rolling.json").read_text())["traceEvents"]
    assert {e["pid"] for e in spans} == set(range(world.size))


@pytest.mark.mpi
def test_the_engine_itself_serves_every_request(world, arguments, capsys):
    few = ("--policies", "rolling,lockstep_balanced", "--step-tokens", "64", "--num-requests", "6")
    options = arguments(*few, "--no-capacity", "--arrivals", "on_off")
    assert serve.run(world, options) == 0
    if world.rank == 0:
        rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
        assert [(row["what"], row["completed"]) for row in rows] == [
            *(("alone", 3) for _ in range(3)),
            *(("saturation", 6) for _ in range(2)),
            *(("load", 6) for _ in range(2)),
        ]
        for row in rows[3:]:
            assert 0 <= row["queueing_ms_p50"] < row["ttft_ms_p50"] <= row["ttft_ms_p99"]


@pytest.mark.mpi
def test_a_step_too_small_for_the_longest_request_is_refused_on_all_ranks(world, arguments):
    with pytest.raises(ConfigError, match="max-tokens-per-rank is 3, but a request has"):
        serve.run(world, arguments("--max-tokens-per-rank", "3"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--arrivals", "often"], "--arrivals often: must be of trace, poisson, on_off"),
        (["--loads", "0.7,0.5"], "positive and rising"),
        (["--seeds", "one"], "numbers are wanted"),
        (["--rate-step", "1"], "must be over 1"),
        (["--step-tokens", "16;64"], "numbers are wanted"),
        (["--limits-ms", "1,2,soon"], "numbers are wanted"),
        (["--limits-ms", "1,2"], "one over 0 is wanted"),
    ],
)
def test_bad_options(arguments, capsys, wrong, message):
    with pytest.raises(SystemExit):
        arguments(*wrong)
    assert message in capsys.readouterr().err


def test_each_seed_has_requests_of_its_own(arguments):
    options = resolve(arguments("--num-requests", "5", "--seeds", "0,1"), "cpu")
    found = requests_of(options, options.trace[0], 1000)
    assert [len(found[s]) for s in (0, 1)] == [5, 5]
    assert found[0][-1].timestamp_ms <= found[1][0].timestamp_ms and found[0] != found[1]
    with pytest.raises(InputError, match="azure2023_conv.csv: .* more than 3 input tokens"):
        requests_of(options, options.trace[0], 3)


def test_defaults_depend_on_the_device(tmp_path):
    options = parse(["--device", "cpu"])
    assert resolve(options, "cuda").step_tokens == (2048, 4096, 8192, 16384) and resolve(options, "cuda").layers == 8
    assert resolve(options, "cpu").model == "small" and settings_of(options).seeds == (0, 1, 2)
