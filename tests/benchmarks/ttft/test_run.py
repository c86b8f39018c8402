"""The main job on 1 to 4 ranks, on a model of two layers; and what it says to bad options."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import results_schema
from benchmarks.ttft import __main__ as ttft
from benchmarks.ttft import judge as ttft_judge
from benchmarks.ttft.options import DEFAULTS, TRACE, configs_of, parse, resolve, workloads_of
from pipemoe.errors import CheckpointError, ConfigError, InputError
from pipemoe.model_facts.known_models import MODEL_CONFIGS
from pipemoe.plan.config import MODES

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 97,
}


@pytest.fixture
def arguments(tmp_path):
    """arguments(more...) -> parsed options of a job that takes seconds."""

    def arguments(*more: str):
        (tmp_path / "tiny.json").write_text(json.dumps({**MODEL_CONFIGS["small"], **TINY}))
        small = [
            "--model",
            str(tmp_path / "tiny.json"),
            "--num-requests",
            "5",
            "--scale",
            "0.02",
            "--rounds",
            "2",
            "--moe-max-num-tokens",
            "16",
        ]
        return parse([*small, "--device", "cpu", "--out", str(tmp_path / "out"), *more])

    return arguments


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.mpi
def test_every_mode_on_rank_tokens(world, arguments, tmp_path, capsys):
    rank_tokens = [33, 2, 0, 5, 1, 0, 17, 3][: world.size]
    options = arguments(
        "--rank-tokens", ",".join(map(str, rank_tokens)), "--json", str(tmp_path / "more.json"), "--rounds", "1"
    )
    assert ttft.run(world, options) == 0
    if world.rank:
        assert capsys.readouterr() == ("", "") and not options.out.exists()
        return
    document = last_line(capsys)
    results_schema.validate(document)
    assert (
        document
        == results_schema.read_results(tmp_path / "out" / "ttft.json")
        == results_schema.read_results(tmp_path / "more.json")
    )
    assert [row["mode"] for row in document["rows"]] == list(MODES)
    for row in document["rows"]:
        assert row["rank_tokens"] == rank_tokens and row["input_lens"] == [n for n in rank_tokens if n]
        assert row["parity"] is True and row["parity_layers"] == row["layers"] == 2
        assert len(row["ttfts"]) == len(row["ranks"]) == row["completed"]
        assert 0 < row["ttft_ms_median_rank"] <= row["ttft_ms_slowest_rank"]
        assert 0 < row["predicted_median_rank_ms"] <= row["predicted_ttft_ms"]
        assert 0 < row["least_mean_ttft_ms"] == row["most_mean_ttft_ms"] and "even_mean_ttft_ms" not in row  # one round
        assert row["plan_ms"] > 0 and row["plan_cached_ms"] > 0
        assert row.get("segments_alone_ms", 1) > 0 and (
            "segments_alone_ms" in row or row["mode"] not in ("padded", "broadcast", "chunked")
        )
        assert row["peak_workspace_bytes"] > 0 and row["exposed_comm_ms"] >= 0
        assert 2 <= row["active_experts"] <= 8 and row["expert_load_max_over_mean"] >= 1 and row["router_skew"] == 0
        assert (row["overlap_pct"] is None) == (world.size == 1)
    name = "_".join(map(str, rank_tokens))
    assert (options.out / f"ttft_{name}.png").read_bytes().startswith(b"\x89PNG")
    for mode in MODES:
        events = json.loads((options.out / f"timeline_{name}_{mode}.json").read_text())["traceEvents"]
        assert {event["pid"] for event in events} == set(range(world.size))


@pytest.mark.mpi
def test_several_workloads_share_the_models(world, arguments, capsys):
    rank_tokens = ",".join(["7"] * world.size)
    options = arguments(
        "--rank-tokens",
        rank_tokens,
        "--trace",
        str(TRACE),
        "--modes",
        "pipelined,padded",
        "--num-requests",
        "3",
    )
    assert ttft.run(world, options) == 0
    if world.rank == 0:
        rows = last_line(capsys)["rows"]
        assert [(row["mode"], row["rank_tokens"]) for row in rows] == [
            (mode, tokens) for tokens in ([7] * world.size, "azure2023_conv") for mode in ("pipelined", "padded")
        ]
        assert [row["completed"] for row in rows] == [world.size] * 2 + [3] * 2


@pytest.mark.mpi
def test_draws_and_budgets(world, arguments, capsys):
    tokens = ",".join(["7"] * world.size)
    options = arguments(
        "--rank-tokens",
        tokens,
        "--modes",
        "broadcast,auto",
        "--draws",
        "2",
        "--draw-rounds",
        "2",
        "--budgets",
        "0,20",
        "--variant",
        "broadcast:max_tokens_per_rank=40,num_slots=1",
        "--scale",
        "0.005",
    )
    assert ttft.run(world, options) == 0
    if world.rank:
        return
    rows = last_line(capsys)["rows"]
    names = ["broadcast", "auto", "auto 0 %", "auto 20 %", "broadcast max_tokens_per_rank=40,num_slots=1"]
    assert [row["mode"] for row in rows] == names * 3
    assert [row["makespan_budget"] for row in rows[:4]] == [0.25, 0.25, 0.0, 0.2]
    # more tokens may come to an uncapped wave, so its buffers are larger
    assert rows[4]["peak_workspace_bytes"] > rows[0]["peak_workspace_bytes"]
    assert [row["trace"] for row in rows] == [None] * 5 + ["azure2023_conv"] * 10
    drawn = rows[5::5]
    assert all(
        len(row["rank_tokens"]) == world.size and max(row["rank_tokens"]) <= 16 and row["exposed_comm_ms"] is None
        for row in drawn
    )
    assert all(row["even_mean_ttft_ms"] > 0 and row["odd_slowest_rank_ms"] > 0 for row in rows)
    text = ttft_judge.judgement(rows)
    assert "geometric mean of draws" in text and "front of mode auto" in text


@pytest.mark.mpi
def test_requests_by_the_traces_clock(world, arguments, capsys):
    options = arguments("--requests", "trace", "--time-scale", "100", "--modes", "pipelined,broadcast", "--rounds", "1")
    assert ttft.run(world, options) == 0
    if world.rank == 0:
        for row in last_line(capsys)["rows"]:
            assert row["requests"] == "trace" and row["completed"] == 5 and row["overlap_pct"] is None
            assert min(row["ttfts"]) > 0


@pytest.mark.mpi
def test_by_default_one_long_prompt_and_a_trace_by_its_clock(world, arguments, monkeypatch, capsys):
    device = world.device.type
    monkeypatch.setitem(DEFAULTS, device, replace(DEFAULTS[device], long_prompt=40, time_scale=200.0))
    assert ttft.run(world, arguments("--modes", "broadcast,auto", "--rounds", "1")) == 0
    if world.rank == 0:
        out = capsys.readouterr().out
        rows = json.loads(out.splitlines()[-1])["rows"]
        skewed = [40] + [16] * (world.size - 1)
        assert [row["rank_tokens"] for row in rows] == [skewed] * 2 + ["azure2023_conv"] * 2
        assert [row["requests"] for row in rows] == ["together"] * 2 + ["trace"] * 2
        assert [row["time_scale"] for row in rows] == [None] * 2 + [200.0] * 2
        assert all(row["parity"] for row in rows)
        assert "azure2023_conv by its own clock, 200 times as fast, waiting included: first tokens after" in out


@pytest.mark.mpi
def test_a_mode_that_is_wrong_is_reported_and_fails_the_job(world, arguments, monkeypatch, capsys):
    from benchmarks.ttft import parity as ttft_parity

    right = ttft_parity.compare
    monkeypatch.setattr(
        ttft_parity, "compare", lambda found, *rest: right([(token + 1, logits) for token, logits in found], *rest)
    )
    assert ttft.run(world, arguments("--modes", "chunked", "--rounds", "1")) == 1
    if world.rank == 0:
        row = last_line(capsys)["rows"][0]
        assert row["parity"] is False and row["parity_wrong_tokens"] > 0


@pytest.mark.mpi
def test_bad_inputs_are_the_same_error_on_every_rank(world, arguments, tmp_path):
    bare = Path(world.all_gather(str(tmp_path).encode())[0].decode())  # rank 0's, for all
    (tmp_path / "config.json").write_text(json.dumps({**MODEL_CONFIGS["small"], **TINY}))
    world.all_gather(b"", "written")
    for more, error, message in (
        (("--trace", "no_such_trace.csv"), InputError, "no_such_trace.csv: cannot be read"),
        (("--model", str(bare)), CheckpointError, f"rank 0: {bare}: holds neither model.safetensors nor"),
        (
            ("--cost", str(bare / "cost.json"), "--modes", "chunked"),
            ConfigError,
            f"rank 0: cost file {bare}/cost.json: No such file",
        ),
        (("--layers", "3"), ConfigError, "--layers is 3; tiny has 2"),
        (("--out", __file__), InputError, "--out .* is no directory"),
        (("--json", "."), InputError, "--json . is a directory"),
        (("--rank-tokens", "1," * world.size + "1"), InputError, f"numbers for {world.size} ranks"),
        (("--max-tokens-per-rank", "1"), ConfigError, "--max-tokens-per-rank is 1, but a step gives one rank"),
    ):
        with pytest.raises(error, match=message):
            ttft.run(world, arguments(*more))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--modes", "padded,nothing"], "give each once, of padded"),
        (["--modes", "padded,padded"], "give each once"),
        (["--rounds", "0"], "invalid positive int value: '0'"),
        (["--scale", "nan"], "invalid positive float value: 'nan'"),
        (["--device", "cpu", "--backend", "nccl"], "--backend nccl is the transport of cuda"),
        (["--requests", "trace", "--rank-tokens", "1,2"], "have no times"),
        (["--time-scale", "5", "--rank-tokens", "1,2"], "--time-scale is of --requests trace"),
        (["--budgets", "5,x"], "whole numbers of percent"),
        (["--budgets", "5", "--modes", "padded"], "not among --modes"),
        (["--modes", "padded", "--variant", "chunked:num_slots=1"], "'chunked' is not among --modes"),
        (["--variant", "chunked:slots=1"], "no setting 'slots'"),
        (["--variant", "chunked"], "no setting ''"),
    ],
)
def test_bad_options_are_refused_by_rank_0_alone(options, message, capsys, monkeypatch):
    monkeypatch.setenv("PMI_RANK", "0")
    with pytest.raises(SystemExit) as refused:
        parse(options)
    assert refused.value.code == 2 and message in capsys.readouterr().err
    monkeypatch.setenv("PMI_RANK", "3")
    with pytest.raises(SystemExit) as quiet:
        parse(options)
    assert quiet.value.code == 0 and capsys.readouterr() == ("", "")


def test_device_and_backend_say_the_same():
    assert parse([]).device == "auto"
    assert parse(["--backend", "mpi"]).device == parse(["--device", "cpu", "--backend", "mpi"]).device == "cpu"
    assert parse(["--backend", "nccl"]).device == "cuda"


def test_defaults_follow_the_device():
    on_cpu, on_gpu = (resolve(parse([]), device) for device in ("cpu", "cuda"))
    assert (on_cpu.model, on_cpu.layers, on_cpu.dtype, on_cpu.parity_layers) == ("small", None, "float32", None)
    assert (on_gpu.model, on_gpu.layers, on_gpu.dtype, on_gpu.parity_layers) == ("qwen3-30b-a3b", 8, "bfloat16", 4)
    named = resolve(parse(["--model", "mixtral-8x7b", "--scale", "2"]), "cuda")
    assert (named.layers, named.scale) == (None, 2.0)


def test_what_a_user_demands_of_plans_is_demanded_in_every_mode():
    options = resolve(parse(["--num-sms", "100", "--rank-tokens", "5,3"]), "cpu")
    configs = configs_of(options, workloads_of(options, 2, 4096))
    assert {config.num_sms for config in configs} == {100} and len(configs) == len(MODES)


def test_what_cannot_be_is_said_before_anything_is_loaded(tmp_path):
    """A prompt beyond the model's positions ended a run after loading and parity; one beyond the room, never."""
    path = tmp_path / "long.csv"
    path.write_text("timestamp_ms,input_tokens,output_tokens\n0,9,1\n1,5000,1\n")

    def found(*more, positions=4096):
        options = resolve(parse(more), "cpu")
        workloads = workloads_of(options, 2, positions)
        return workloads, configs_of(options, workloads)

    trace = ("--trace", str(path), "--scale", "1")
    with pytest.raises(InputError, match="long.csv: 1 of 2 requests have more than 4096 input tokens"):
        found(*trace)
    (workload,), _ = found(*trace, "--too-long", "clip")
    assert workload.longest == 4096
    with pytest.raises(InputError, match="a prompt of 5000 tokens, but the model has positions for 4096"):
        found("--rank-tokens", "5000,1")
    for requests in ("trace", "together"):
        with pytest.raises(ConfigError, match="--max-tokens-per-rank is 100, but a step gives one rank 5000"):
            found(*trace, "--requests", requests, "--max-tokens-per-rank", "100", positions=8192)
