"""Many rounds with requests that come at random, half of them cancelled, a rank without any, and threads that are held
up at random: what is answered is right, everything is answered, and nothing grows.

PIPEMOE_SOAK_ROUNDS: rounds of all slots together (default: 20,000).
"""

import mmap
import os
import random
import threading
from pathlib import Path

import pytest

from pipemoe.models.round_source import RoundSource
from tests.serving.prompts import KEPT_TOKENS, STEP_TOKENS, WAIT, prompt

pytestmark = [pytest.mark.mpi, pytest.mark.slow]
ROUNDS = int(os.environ.get("PIPEMOE_SOAK_ROUNDS", "20000"))
# Of all slots, that an answer may take. The last slot has memory for one long prompt of a rank, which takes ten rounds.
# Behind a full queue of these comes the bound on the rounds in which a sequence is offered in vain.
MOST_ROUNDS_WAITED = 2 * (16 * 10 + 32 + 20 * 16)
PROMPTS = [prompt(n, n) for n in (1, 2, STEP_TOKENS - 1, STEP_TOKENS, STEP_TOKENS + 1, 4 * STEP_TOKENS, KEPT_TOKENS)]


def size_of_process() -> tuple[int, int, int]:
    """MiB in memory, open files, threads."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE >> 20, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def test_nothing_grows_and_everything_is_answered(world, open_engine, is_right, monkeypatch):
    draw, sizes = random.Random(world.rank), []
    delays, pause, attend = random.Random(~world.rank), threading.Event(), RoundSource.attend

    def late(source, cohort, layer, rows=None):
        if delays.random() < 0.01:
            pause.wait(0.005 * delays.random())
        attend(source, cohort, layer, rows)

    monkeypatch.setattr(RoundSource, "attend", late)

    def rounds() -> int:
        return sum(slot["rounds_with_work"] for slot in engine.statistics()["slots"])

    def answer(future):
        """Counted in rounds: on a machine that others use too, these may take any time."""
        first_round = last_round = rounds()
        while True:
            try:
                return future.result(WAIT)
            except TimeoutError:
                now = rounds()
                if now == last_round or now > first_round + MOST_ROUNDS_WAITED:
                    told = f"no answer in rounds {first_round} to {now}; {engine._loop}; {engine.statistics()}"
                    raise AssertionError(told) from None
                last_round = now

    num_asked = num_checked = 0
    with open_engine(max_queue=16, when_full="wait") as engine:
        share = 0.0 if world.rank == world.size - 1 and world.rank else 1.0  # of the asking; the last rank asks nothing
        asked = []
        while rounds() < ROUNDS:
            if not share:
                pause.wait(0.05)  # its rounds come from the others
            else:
                tokens = draw.choice(PROMPTS)
                asked.append((tokens, engine.submit(tokens, draw.randrange(-3, 4))))
                num_asked += 1
                if draw.random() < 0.5:
                    draw.choice(asked)[1].cancel()
            if len(asked) >= 64:
                for tokens, future in asked:
                    if future.cancelled():
                        continue
                    first = answer(future)
                    if draw.random() < 0.05:
                        num_checked += 1
                        assert is_right(tokens, first)
                asked.clear()
            if rounds() >= (1 + len(sizes)) * ROUNDS // 10:
                sizes.append(size_of_process())
                print(f"rank {world.rank}: {rounds()} rounds, {sizes[-1]}", flush=True)
        assert engine.drain(WAIT)
        found = engine.statistics()
        assert found["answered"] + found["cancelled"] == found["submitted"] == num_asked
        assert not found["queued"] and not found["failed"]
    assert all(slot["kept_tokens"] == 0 for slot in engine.statistics()["slots"])
    print(f"rank {world.rank}: {rounds()} rounds, {num_asked} requests, {num_checked} checked; {sizes}")
    (early_mib, *early), (late_mib, *late_counts) = sizes[2], sizes[-1]
    assert late_mib <= early_mib + 32 and [n <= m for n, m in zip(late_counts, early)] == [True, True], sizes
