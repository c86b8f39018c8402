"""The program of test_engine_faults: every rank opens an Engine, and one of them meets a fault.

Arguments: the fault, and a folder for what each rank says and its process number, and for the time of a signal.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

import pipemoe
from pipemoe.errors import PipemoeError
from pipemoe.models.round_source import RoundSource
from pipemoe.plan.schedule import Plan
from tests.faults.detach import detach
from tests.faults.ranks import CULPRIT
from tests.faults.stacks import tell_stacks_of_timeouts
from tests.models.tiny import tiny_config

WATCHDOG_SECONDS = 8.0  # a busy machine may hold a rank up for some seconds
LONG, SHORT = [5] * 120, [7] * 9


def main(fault: str, folder: str) -> None:
    if fault.startswith("kill"):
        detach()
    torch.set_num_threads(1)
    world = pipemoe.init(watchdog_seconds=WATCHDOG_SECONDS, grace_seconds=1.0, num_slots=2)
    tell_stacks_of_timeouts(world)
    log = os.open(f"{folder}/rank{world.rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, sys.stderr.fileno())
    (Path(folder) / f"pid{world.rank}").write_text(str(os.getpid()))
    settings = pipemoe.Config(moe_max_num_tokens=32, max_tokens_per_rank=64)
    model = pipemoe.load_model(tiny_config("qwen3_moe"), world, config=settings)
    engine = pipemoe.Engine(model, step_tokens=16, max_kept_tokens=128, num_slots=2)
    assert engine.submit(SHORT).result(60).finite
    is_culprit = world.rank == CULPRIT

    def meet_signal(number: int) -> None:
        (Path(folder) / "fault").write_text(str(time.time()))
        os.kill(os.getpid(), number)

    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
    attend = RoundSource.attend

    def attend_or_die(source, cohort, layer, rows=None):
        if source._pieces[0].length == len(LONG) and source._pieces[0].start:
            meet_signal(signals[fault])
        attend(source, cohort, layer, rows)

    if fault == "none":
        threading.Event().wait(1.2 * WATCHDOG_SECONDS)
        assert engine.submit(SHORT).result(60).finite
        if is_culprit:
            return  # without closing: its end waits for the others
        assert engine.submit(LONG).result(60).finite
        engine.close()
    else:
        if is_culprit and fault in signals:
            RoundSource.attend = attend_or_die
        futures = [engine.submit(LONG)] if is_culprit or not fault.endswith("idle") else []
        if is_culprit and fault == "plan":
            Plan.digest = property(lambda plan: bytes(16))
        if is_culprit and fault == "raise":
            raise ValueError("planted")
        if is_culprit and fault == "kill idle":
            futures[0].result(60)
            engine.drain()
            meet_signal(signal.SIGKILL)
        if not is_culprit and fault == "kill idle":  # nothing is under way here until the fault
            while not (Path(folder) / "fault").exists():
                threading.Event().wait(0.01)
            threading.Event().wait()
        while True:
            for future in futures:
                try:
                    future.result(60)
                except PipemoeError as error:
                    os.write(2, f"future: {type(error).__name__}: {error}\n".encode())
                    threading.Event().wait()
            futures = [engine.submit(SHORT), engine.submit(LONG)]
    print(f"rank {world.rank} is done", flush=True)
    world.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
