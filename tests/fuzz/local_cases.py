"""Calls that concern one process alone: `pipemoe plan`, request traces, quantise_experts, local_range, init."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
from random import Random
from typing import Any

import torch

import pipemoe
from pipemoe import ExpertWeights
from pipemoe.cli import main
from pipemoe.e4m3 import BLOCK
from pipemoe.experts import dequantise_experts, quantise_experts
from pipemoe.plan.model_configs import MODEL_CONFIGS
from pipemoe.plan.schedule import COMBINES, MODES, OBJECTIVES
from tests.fuzz.case import ODD, RIGHT, WRONG, Argument, Case, Draw
from tests.fuzz.model_cases import change_config, linked_copy
from tests.fuzz.odd import odd_number, odd_value
from tests.fuzz.stage import Stage
from tests.models.tiny import FAMILIES
from tests.moe_cases import norm_ratio

_NUMBERS = ("0", "1", "-1", "7", "200", "1.5", "nan", "inf", "", " ", "x", "1e3", "0x10", "٣", "1_000", "+5", "9" * 30, "9" * 5000, "-0", "4294967296", "\ud800")
_COUNTS = ("5,3", "512+16,0,3", "0", "0,0", "4096,16", "1,2,3,4,5,6,7,8", "", ",", "5,", "+", "5+", "-5,3", "1,x", "1.5", "٣,1", "9" * 30, "3000000,3000000", "1" + ",1" * 40)
_VALUES = {
    "--gpu": ("h200", "h100", "a100", "b200", "", "cpu"),
    "--mode": (*MODES, "", "AUTO"),
    "--objective": (*OBJECTIVES, "x"),
    "--combine": (*COMBINES, "x"),
    "--dtype": ("float32", "bfloat16", "float16", "float64", "int8"),
    "--arrivals": ("on", "off", "maybe"),
}
_NUMBERED = (
    *("--ranks", "--layers", "--makespan-budget", "--moe-max-num-tokens", "--max-tokens-per-rank", "--slots"),
    *("--combine-blocks", "--num-sms", "--ranks-per-gpu", "--width"),
)


def plan_command(draw: Draw, stage: Stage) -> Case:
    """`pipemoe plan` with odd arguments: a report, or one line that says what is wrong."""
    random = draw.random
    counts = random.choice(_COUNTS) if random.random() < 0.3 else ",".join(str(random.choice((0, 1, 16, 300, 4096))) for _ in range(random.randint(1, 8)))
    line = ["plan", "--rank-tokens", counts]
    folder, what = stage.new_folder(), ""
    if random.random() < 0.4:
        line += ["--model", random.choice(sorted(MODEL_CONFIGS))]
    elif random.random() < 0.5:
        linked_copy(stage.checkpoint(random.choice(FAMILIES)), folder)
        what = f" ({change_config(folder, random)})"
        line += ["--model", str(folder)]
    elif random.random() < 0.3:
        line += ["--model", random.choice(("", ".", "nowhere", "/dev/null", "a\0b", "x" * 5000, "\ud800"))]
    if "--layers" not in line and random.random() < 0.8:
        line += ["--layers", "3"]
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        option = random.choice((*_VALUES, *_NUMBERED))
        line += [option, random.choice(_VALUES[option] if option in _VALUES else _NUMBERS)]
    if random.random() < 0.15:
        line += ["--trace", random.choice(("/dev/full", "/dev/null", str(folder), str(folder / "trace.json"), "", "a\0b", "/nowhere/trace", str(folder / ("x" * 300))))]
    if random.random() < 0.1:
        cost = folder / "cost.json"
        cost.write_bytes(random.choice((b"", b"{}", b"[]", b"null", b'{"version": 4}', b'{"cost": {"attend": null}}', b"\xff", b"[" * 10**5)))
        line += ["--cost", random.choice((str(cost), "", ".", "nowhere"))]
    if random.random() < 0.1:
        line += [random.choice(("--pareto", "--nonsense", "--", "more", "-h", "--model", "--trace"))]

    def call() -> tuple[Any, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(line)
            except SystemExit as end:
                status = end.code
        return status, out.getvalue(), err.getvalue()

    text = " ".join(f"{word!r:.60}" for word in line[1:]).replace(str(stage.folder), "FOLDER")
    return Case("pipemoe plan", [Argument(text + what, line)], call, _judge_report, ODD, is_local=True)


def _judge_report(report: tuple[Any, str, str]) -> str | None:
    status, out, err = report
    if "Traceback" in err or "Traceback" in out:
        return "a traceback"
    if status not in (0, 2):
        return f"exit status {status}"
    if status == 2 and not err.strip():
        return "exit status 2 without a word"
    if status == 0 and not out.strip():
        return "exit status 0 without a word"
    times = [float(ms) for ms in re.findall(r"(?:mean TTFT|slowest) (\S+) ms", out)]
    if any(not 0 < ms < 1e15 for ms in times):
        return f"predicted times {times}"
    return None


_TRACE = "timestamp_ms,input_tokens,output_tokens\n0,5,1\n2500,7,2\n9000,1,0\n"
_JSON_TRACE = '{"timestamp": 0, "input_length": 5, "output_length": 1}\n{"timestamp": 9000, "input_length": 7, "output_length": 2}\n'
_PIECES = ("nan", "-1", "1e400", "٣", "\0", '"', ",", "\n", "\r", "{", "}", "[", "null", "true", "9" * 5000, "\ufeff", ";", " ", "'", "1.0", "-0", "\x1c", "\u2028")


def trace(draw: Draw, stage: Stage) -> Case:
    """read_trace of a file with a piece put in, taken out, or said twice."""
    from request_trace import Request, read_trace

    random = draw.random
    text, what = random.choice((_TRACE, _JSON_TRACE)), []
    for _ in range(random.choice((0, 1, 1, 2))):
        at, piece = random.randrange(len(text)), random.choice(_PIECES)
        length = random.choice((0, 1, 5, 20))
        text = text[:at] + piece + text[at + length :]
        what.append(f"{piece!r:.20} in place of {length} characters at {at}")
    file = stage.new_folder() / "trace"
    file.write_text(text, encoding="utf-8", newline="")

    def judge(requests: Any) -> str | None:
        right = all(isinstance(r, Request) and 0 <= r.timestamp_ms < 1e300 and type(r.input_tokens) is int and r.input_tokens >= 1 for r in requests)
        return None if requests and right else f"it was read as {requests!r:.200}"

    return Case("read_trace", [Argument("; ".join(what) or "as it should be", file)], lambda: read_trace(file), judge, ODD if what else RIGHT, is_local=True)


def quantise(draw: Draw, stage: Stage) -> Case:
    """quantise_experts of odd weights; what it gives is near what it got."""
    random = draw.random
    generator = torch.Generator().manual_seed(random.randrange(5))
    hidden, width = random.choice(((BLOCK, BLOCK), (2 * BLOCK, BLOCK), (100, 30)))
    right = ExpertWeights(torch.randn(2, 2 * width, hidden, generator=generator), torch.randn(2, hidden, width, generator=generator))
    what, value = odd_value(random)
    field = random.choice([f.name for f in dataclasses.fields(ExpertWeights)])
    bad = right.down.clone()
    bad[0, 0, 0] = random.choice((torch.nan, torch.inf, -torch.inf))
    choices: dict[str, tuple[Any, str]] = {
        "right weights": (right, RIGHT),
        "none of them": (dataclasses.replace(right, gate_up=right.gate_up[:0], down=right.down[:0]), RIGHT),
        "bfloat16": (dataclasses.replace(right, gate_up=right.gate_up.bfloat16(), down=right.down.bfloat16()), RIGHT),
        "zeros": (dataclasses.replace(right, down=torch.zeros_like(right.down)), RIGHT),
        "tiny values": (dataclasses.replace(right, down=right.down * 1e-40), ODD),
        "huge values": (dataclasses.replace(right, down=right.down * 1e37), ODD),
        "no number": (dataclasses.replace(right, down=bad), ODD),
        "quantised twice": (quantise_experts(right), ODD),
        "column-major": (dataclasses.replace(right, down=right.down.transpose(1, 2).contiguous().transpose(1, 2)), ODD),
        f"weights are {what}": (value, WRONG),
        f"{field} is {what}": (dataclasses.replace(right, **{field: value}), ODD),
    }
    name = random.choice(list(choices))
    weights, meaning = choices[name]

    def judge(found: ExpertWeights) -> str | None:
        if meaning != RIGHT:
            return None
        back = dequantise_experts(found, torch.float32)
        ratios = [norm_ratio(b, w) for b, w in ((back.gate_up, weights.gate_up), (back.down, weights.down)) if w.numel() and w.any()]
        return None if all(ratio < 0.05 for ratio in ratios) else f"off by {ratios}"

    return Case("quantise_experts", [Argument(name, weights)], lambda: quantise_experts(weights), judge, meaning, is_local=True)


def local_range(draw: Draw, stage: Stage) -> Case:
    """pipemoe.local_range of odd numbers."""
    random = draw.random
    passed, names = [7, 3, 1], ["7", "3", "1"]
    at = random.randrange(3)
    names[at], passed[at] = random.choice((odd_value(random), odd_number(random, passed[at])))

    def judge(found: Any) -> str | None:
        return None if isinstance(found, range) and len(found) >= 0 else f"it gave a {type(found).__name__}"

    return Case("local_range", [Argument(", ".join(names), passed)], lambda: pipemoe.local_range(*passed), judge, ODD, is_local=True)


_ENVIRONMENT = {
    **dict.fromkeys(("PIPEMOE_NUM_SLOTS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"), ("", " ", "x", "0", "-1", "1.5", "٣", "9" * 30, "1")),
    "WORLD_SIZE": ("2", "8", "x", "", "1"),
}
_RIGHT_ENVIRONMENT = ("1",)
RIGHT_INIT = {"watchdog_seconds": 10.0, "grace_seconds": 1.0, "num_slots": 1, "device": "cpu", "setup_seconds": 60.0}


def init(draw: Draw, stage: Stage) -> Case:
    """init(...) with odd arguments or an odd environment, the same on all ranks, then close(). There is no world beside it."""

    def mutated(random: Random) -> Argument:
        name = random.choice(sorted(RIGHT_INIT))
        what, value = odd_value(random) if name == "device" or random.random() < 0.5 else odd_number(random, 3)
        if draw.size == 1 and random.random() < 0.2:
            variable = random.choice(sorted(_ENVIRONMENT))
            text = random.choice(_ENVIRONMENT[variable])
            passed = {variable: text} | ({"num_slots": None} if variable == "PIPEMOE_NUM_SLOTS" else {})
            return Argument(f"{variable}={text!r:.20}", passed, RIGHT if text in _RIGHT_ENVIRONMENT else ODD)
        choices = {
            "nothing odd": ({}, RIGHT),
            "num_slots": ({"num_slots": random.choice((1, 2, 4))}, RIGHT),
            "num_slots of 2000": ({"num_slots": 2000}, ODD),
            "watchdog_seconds nan": ({"watchdog_seconds": float("nan")}, WRONG),
            "a negative time": ({random.choice(("watchdog_seconds", "setup_seconds", "grace_seconds")): -1}, WRONG),
            f"{name} is {what}": ({name: value}, ODD),
        }
        chosen = random.choice([*choices, *[f"{name} is {what}"] * 5])
        return Argument(chosen, *choices[chosen])

    # What one rank alone does wrong here, the others learn by the clock, and end.
    argument = mutated(draw.random)
    passed = argument.value

    def call() -> list[bytes]:
        return open_and_close(RIGHT_INIT | passed)

    def judge(found: list[bytes]) -> str | None:
        return None if found == [str(r).encode() for r in range(draw.size)] else f"all_gather gave {found}"

    return Case("init", [argument] * draw.size, call, judge, argument.meaning)


def open_and_close(passed: dict[str, Any]) -> list[bytes]:
    """The ranks' numbers as a world exchanges them that was made with these arguments, and variables of the environment."""
    variables = {name: value for name, value in passed.items() if name in _ENVIRONMENT}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        world = pipemoe.init(**{name: value for name, value in passed.items() if name not in variables})
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    with world:
        return world.all_gather(str(world.rank).encode())
