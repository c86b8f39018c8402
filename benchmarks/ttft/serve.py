"""Replay of a trace by its own clock: each rank queues requests and prefills them; all ranks step together.

TTFT runs from when a request comes, so it includes the wait for the step under way and, in lockstep modes, for the
other ranks' prompts. There is no decoding: a request leaves with its first token.
"""

from __future__ import annotations

import json
import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.bench_main import Progress
from benchmarks.ttft.inputs import Prompt, Workload
from benchmarks.ttft.measure import Measured
from benchmarks.ttft.row import ServedRequest

if TYPE_CHECKING:
    from pipemoe import Model, World


def serve(
    world: World,
    models: dict[str, Model],
    workload: Workload,
    *,
    rounds: int,
    seed: int,
    progress: Progress,
) -> dict[str, Measured]:
    """Figures of all modes: medians over `rounds` interleaved replays."""
    modes = list(models)
    replays: dict[str, list[list[dict]]] = {mode: [] for mode in modes}
    for round_number in range(rounds):
        first = round_number % len(modes)
        for done, mode in enumerate(modes[first:] + modes[:first]):
            if round_number == 0:
                models[mode].prefill(
                    [p.token_ids(models[mode].decoder.vocab_size, seed) for p in workload.steps[0][world.rank]]
                )
            replays[mode].append(_replay(world, models[mode], workload, seed))
            progress.count(
                round_number * len(modes) + done + 1,
                rounds * len(modes),
                f"{workload.name}: replay {round_number + 1}, {mode}",
            )
    return {mode: _measured(replays[mode]) for mode in modes}


def _replay(world: World, model: Model, workload: Workload, seed: int) -> list[dict]:
    """All ranks' served requests of one replay, in order of rank and service."""
    vocab_size, room = model.decoder.vocab_size, model.config.max_tokens_per_rank
    assert workload.time_scale is not None  # or requests have no times
    time_scale = workload.time_scale
    waiting = deque((p.arrival_s / time_scale, p, p.token_ids(vocab_size, seed)) for p in workload.prompts[world.rank])
    served: list[dict] = []
    world.all_gather(b"", "start of a replay")
    begin, step = time.perf_counter(), 0
    while True:
        # One small exchange per step: is anything left anywhere, and when does the next request come?
        now = time.perf_counter() - begin
        until_next = max(0.0, waiting[0][0] - now) if waiting else None
        left = [
            u
            for u in (
                json.loads(p) for p in world.all_gather(json.dumps(until_next).encode(), "when the next request comes")
            )
            if u is not None
        ]
        if not left:
            break
        time.sleep(min(left))
        called = time.perf_counter() - begin
        batch = _arrived(waiting, called, room)
        ttfts = model.prefill([ids for _, _, ids in batch]).ttft_seconds
        for (arrival, prompt, _), seconds in zip(batch, ttfts, strict=True):
            served.append(
                {
                    "rank": prompt.rank,
                    "number": prompt.number,
                    "tokens": prompt.num_tokens,
                    "step": step,
                    "ttft": called + seconds - arrival,
                    "end": called + seconds,
                }
            )
        step += 1
    payloads = world.all_gather(json.dumps(served).encode(), "served requests")
    return [request for payload in payloads for request in json.loads(payload)]


def _arrived(waiting: deque[tuple[float, Prompt, object]], now: float, room: int) -> list[tuple[float, Prompt, object]]:
    """Take from the queue what has arrived by `now`, as long as it fits into `room` tokens."""
    batch = []
    while waiting and waiting[0][0] <= now and waiting[0][1].num_tokens <= room:
        room -= waiting[0][1].num_tokens
        batch.append(waiting.popleft())
    return batch


def _measured(replays: list[list[dict]]) -> Measured:
    """Medians over replays per request; its step is that of the first replay. Idle gaps make overlap meaningless."""
    times: dict[int, list[float]] = {}
    for replay in replays:
        for request in replay:
            times.setdefault(request["number"], []).append(request["ttft"])
    requests = [
        ServedRequest(r["rank"], r["tokens"], float(np.median(times[r["number"]])), r["step"]) for r in replays[0]
    ]
    duration_s = float(np.median([max(r["end"] for r in replay) for replay in replays]))
    return Measured(requests, duration_s, None, None, [], {})
