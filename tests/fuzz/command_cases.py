"""`pipemoe plan` with odd arguments and files, and request traces with odd bytes."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

from pipemoe.cli import main
from pipemoe.model_facts.known_models import MODEL_CONFIGS
from pipemoe.plan.config import COMBINES, MODES, OBJECTIVES
from tests.fuzz.case import ODD, RIGHT, Argument, Case, Draw
from tests.fuzz.checkpoint_changes import change_config, linked_copy
from tests.fuzz.stage import Stage
from tests.models.tiny import FAMILIES

_NUMBERS = (
    "0",
    "1",
    "-1",
    "7",
    "200",
    "1.5",
    "nan",
    "inf",
    "",
    " ",
    "x",
    "1e3",
    "0x10",
    "٣",
    "1_000",
    "+5",
    "9" * 30,
    "9" * 5000,
    "-0",
    "4294967296",
    "\ud800",
)
_COUNTS = (
    "5,3",
    "512+16,0,3",
    "0",
    "0,0",
    "4096,16",
    "1,2,3,4,5,6,7,8",
    "",
    ",",
    "5,",
    "+",
    "5+",
    "-5,3",
    "1,x",
    "1.5",
    "٣,1",
    "9" * 30,
    "3000000,3000000",
    "1" + ",1" * 40,
)
_VALUES = {
    "--gpu": ("h200", "h100", "a100", "b200", "", "cpu"),
    "--mode": (*MODES, "", "AUTO"),
    "--objective": (*OBJECTIVES, "x"),
    "--combine": (*COMBINES, "x"),
    "--dtype": ("float32", "bfloat16", "float16", "float64", "int8"),
}
_NUMBERED = (
    *("--ranks", "--layers", "--makespan-budget", "--moe-max-num-tokens", "--max-tokens-per-rank", "--slots"),
    *("--num-sms", "--ranks-per-gpu", "--width"),
)


def plan_command(draw: Draw, stage: Stage) -> Case:
    """`pipemoe plan` with odd arguments: a report, or one line that says what is wrong."""
    random = draw.random
    counts = (
        random.choice(_COUNTS)
        if random.random() < 0.3
        else ",".join(str(random.choice((0, 1, 16, 300, 4096))) for _ in range(random.randint(1, 8)))
    )
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
        line += [
            "--trace",
            random.choice(
                (
                    "/dev/full",
                    "/dev/null",
                    str(folder),
                    str(folder / "trace.json"),
                    "",
                    "a\0b",
                    "/nowhere/trace",
                    str(folder / ("x" * 300)),
                )
            ),
        ]
    if random.random() < 0.1:
        cost = folder / "cost.json"
        cost.write_bytes(
            random.choice(
                (b"", b"{}", b"[]", b"null", b'{"version": 4}', b'{"cost": {"attend": null}}', b"\xff", b"[" * 10**5)
            )
        )
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
_JSON_TRACE = """{"timestamp": 0, "input_length": 5, "output_length": 1}
{"timestamp": 9000, "input_length": 7, "output_length": 2}
"""
_PIECES = (
    "nan",
    "-1",
    "1e400",
    "٣",
    "\0",
    '"',
    ",",
    "\n",
    "\r",
    "{",
    "}",
    "[",
    "null",
    "true",
    "9" * 5000,
    "\ufeff",
    ";",
    " ",
    "'",
    "1.0",
    "-0",
    "\x1c",
    "\u2028",
)


def trace(draw: Draw, stage: Stage) -> Case:
    """read_trace of a file with a piece put in, taken out, or said twice."""
    from pipemoe.traffic.request_trace import Request, read_trace

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
        right = all(
            isinstance(r, Request)
            and 0 <= r.timestamp_ms < 1e300
            and type(r.input_tokens) is int
            and r.input_tokens >= 1
            for r in requests
        )
        return None if requests and right else f"it was read as {requests!r:.200}"

    return Case(
        "read_trace",
        [Argument("; ".join(what) or "as it should be", file)],
        lambda: read_trace(file),
        judge,
        ODD if what else RIGHT,
        is_local=True,
    )
