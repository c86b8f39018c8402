"""The program of the fuzz: every rank draws the same cases, makes its call of each, and the ranks compare the outcomes.

    python tests/fuzz/job.py --seed N --case K [--section init]                    # one case again, on one rank
    launch/mpirun.sh -n 2 tests/fuzz/job.py --seed N --case K [--section init]     # on two

Every case must end in success with the right result, or in the same PipemoeError on every rank; and after it a valid
call works. Prints a line for each case that does not. Ends with exit status 1 if there were such, with BROKEN if the
ranks cannot go on after one.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import pipemoe  # noqa: E402
from pipemoe.errors import FatalError, PipemoeError  # noqa: E402
from tests.fuzz import (  # noqa: E402
    command_cases,
    config_cases,
    constructor_cases,
    init_cases,
    layer_cases,
    local_cases,
    model_cases,
    prefill_cases,
    step_cases,
    world_cases,
)
from tests.fuzz.case import RIGHT, WRONG, Case, Draw  # noqa: E402
from tests.fuzz.global_state import AROUND, state  # noqa: E402
from tests.fuzz.meeting import Absent, Meeting  # noqa: E402
from tests.fuzz.stage import Stage  # noqa: E402

BROKEN = 3
_MOST_BYTES = 6 << 30  # of this process: an argument that asks for more must be refused, not served
_COLLECTIVE = {
    prefill_cases.prefill: 5,
    prefill_cases.prefill_options: 2,
    layer_cases.layer_call: 5,
    step_cases.steps: 4,
    constructor_cases.constructor: 2,
    world_cases.all_gather: 1,
    model_cases.load: 4,
    model_cases.load_arguments: 3,
    config_cases.config: 3,
    config_cases.with_config: 1,
}
_ON_SEVERAL = {world_cases.mixed: 1}
_LOCAL = {command_cases.plan_command: 3, command_cases.trace: 2, local_cases.quantise: 2, local_cases.local_range: 1}


def make_case(seed: int, number: int, section: str, stage: Stage, rank: int, size: int) -> Case:
    draw = Draw(seed, number, rank, size)
    makers: dict[Callable[[Draw, Stage], Case], int] = (
        {init_cases.init: 1} if section == "init" else _COLLECTIVE | (_LOCAL if size == 1 else _ON_SEVERAL)
    )
    (maker,) = draw.random.choices(list(makers), list(makers.values()))
    around = draw.random.choice(list(AROUND)) if draw.random.random() < 0.2 else ""
    case = maker(draw, stage)
    case.around = around
    return case


def perform(case: Case) -> dict[str, Any]:
    """Make the call; what became of it, in plain words."""
    before = state()
    try:
        with AROUND[case.around]() if case.around else contextlib.nullcontext():
            result = case.call()
    except BaseException as error:  # noqa: BLE001  (whatever it is, the ranks compare it)
        outcome = _described(case, error)
        del error
    else:
        try:
            wrong = case.judge(result)
        except Exception as error:  # noqa: BLE001  (such as a model that loads and cannot prefill)
            wrong = f"{type(error).__name__} after it: {error}"
        outcome = {"kind": "wrong", "text": wrong} if wrong else {"kind": "ok"}
    changed = [name for name, value in state().items() if before[name] != value]
    if changed:
        return {"kind": "wrong", "text": f"{', '.join(changed)} changed; {outcome}"}
    return outcome


def _described(case: Case, error: BaseException) -> dict[str, Any]:
    try:
        text = str(error)
    except Exception as unsaid:  # noqa: BLE001
        text = f"cannot be put into words: {type(unsaid).__name__}"
    if isinstance(error, PipemoeError) and "cannot be put into words" not in text:
        kind = "fatal" if isinstance(error, FatalError) else "error"
    else:
        kind = "own" if isinstance(error, case.own_errors) and "planted" in text else "other"
    return {"kind": kind, "text": f"{type(error).__name__}: {text}"[:2000].encode(errors="replace").decode()}


def judge(case: Case, outcomes: list[dict[str, Any]]) -> list[str]:
    """What is wrong with what became of a case on the ranks."""
    said = [
        f"rank {rank}: {outcome['text']}" for rank, outcome in enumerate(outcomes) if outcome["kind"] not in ("ok",)
    ]
    if any(outcome["kind"] in ("wrong", "fatal", "other") for outcome in outcomes):
        return said
    if said and case.wanted == RIGHT:
        return ["should have worked", *said]
    if not said and case.wanted == WRONG:
        return ["should have been refused"]
    if not case.is_local and not case.may_defer and len({json.dumps(outcome) for outcome in outcomes}) > 1:
        return ["not the same on all ranks", *said]
    return []


class Job:
    """The ranks' way through some cases."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.rank, self.size = _place()
        self.meeting = Meeting(folder, self.rank, self.size, options.seconds)
        self.log = os.open(folder / f"rank{self.rank}.jsonl", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        own = Path(tempfile.mkdtemp(prefix=f"rank{self.rank}_", dir=folder))
        world = None
        if options.section == "api":
            world = pipemoe.init("cpu", watchdog_seconds=options.seconds / 3, setup_seconds=600, grace_seconds=2)
        self.stage = Stage(world, own)
        if world is not None:
            self.stage.canary(with_model=True, anew=False)  # compiles the planner, where that has not been done
            world.setup_seconds = options.seconds / 2
        self.num_bad = 0

    def write(self, **record: Any) -> None:
        os.write(self.log, json.dumps(record).encode() + b"\n")

    def run(self) -> int:
        options = self.options
        for number in range(options.first, options.first + options.cases):
            faulthandler.dump_traceback_later(4 * options.seconds, exit=True)
            self.write(case=number, begun=True)
            case = make_case(options.seed, number, options.section, self.stage, self.rank, self.size)
            self.write(case=number, text=case.text)
            broken = False
            outcomes: list[dict[str, Any]] = []
            try:
                outcomes = self.meeting.all(perform(case))
                problems = judge(case, outcomes)
                if not case.is_local:
                    unwell = self._canaries(case, number)
                    problems += unwell
                    broken = bool(unwell)
            except Absent as absent:
                problems, broken = [f"rank {self.rank} waits for another rank in vain ({absent})"], True
            broken = broken or any(outcome["kind"] == "fatal" for outcome in outcomes)
            became = "success" if all(o["kind"] == "ok" for o in outcomes) else "error"
            self.write(case=number, api=case.api, became=became, problems=problems, done=True)
            if problems:
                self.num_bad += 1
                if self.rank == 0:
                    self._say(number, case, problems)
            if broken:
                return BROKEN
        faulthandler.cancel_dump_traceback_later()
        if self.stage.world is not None:
            self.stage.world.close()
        return min(self.num_bad, 1)

    def _canaries(self, case: Case, number: int) -> list[str]:
        """Whether valid calls still work, after one that tells everyone of what failed inside the last step."""

        def canary() -> str | None:
            return (
                self.stage.canary(with_model=number % 4 == 0, anew=case.makes)
                if self.stage.world
                else self._opened_again()
            )

        for turn in range(2):
            outcomes = self.meeting.all(perform(Case("canary", [], canary, lambda wrong: wrong)))
            texts = [outcome.get("text", "") for outcome in outcomes]
            if not any(texts):
                return []
            is_news = case.may_defer and turn == 0 and len(set(texts)) == 1 and texts[0].startswith("ModelError: rank ")
            if not is_news:
                return [
                    "the next call does not work: "
                    + "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))
                ]
        return ["the call after the next does not work"]

    def _opened_again(self) -> str | None:
        found = init_cases.open_and_close(init_cases.RIGHT_INIT)
        return None if len(found) == self.size else f"all_gather gave {found}"

    def _say(self, number: int, case: Case, problems: list[str]) -> None:
        options = self.options
        runner = "$PIPEMOE_PYTHON" if self.size == 1 else f"launch/mpirun.sh -n {self.size}"
        section = "" if options.section == "api" else f" --section {options.section}"
        again = f"{runner} tests/fuzz/job.py --seed {options.seed} --case {number}{section}"
        line = f"FAILED {again} | {case.text} | {' | '.join(problems)}"
        print(line.replace("\n", "\\n").encode(errors="replace").decode(), flush=True)


def _place() -> tuple[int, int]:
    """This process's rank and their number, as launchers say."""
    for launcher in ("OMPI_COMM_WORLD", "PMI"):
        if f"{launcher}_SIZE" in os.environ:
            return int(os.environ[f"{launcher}_RANK"]), int(os.environ[f"{launcher}_SIZE"])
    return 0, 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=1, help="how many")
    parser.add_argument("--case", type=int, help="only this one")
    parser.add_argument("--section", choices=("api", "init"), default="api")
    parser.add_argument("--seconds", type=float, default=60.0, help="that ranks wait for one another")
    parser.add_argument("--folder", type=Path, help="for what ranks write; the same on all")
    options = parser.parse_args()
    if options.case is not None:
        options.first, options.cases = options.case, 1
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_BYTES, _MOST_BYTES))
    faulthandler.enable()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(_shared_folder(options.seed)))
        status = Job(options, folder).run()
        sys.stdout.flush()
        sys.stderr.flush()
        if status == BROKEN:
            os._exit(status)  # the library's own end would wait for the other ranks
    return status


@contextlib.contextmanager
def _shared_folder(seed: int) -> Any:
    """A folder that ranks of one job find without having met: by their parent process."""
    rank, _ = _place()
    folder = Path(tempfile.gettempdir()) / f"pipemoe_fuzz_{os.getppid()}_{seed}_{Random(seed).random():.6f}"
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        if rank == 0:
            import shutil

            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
