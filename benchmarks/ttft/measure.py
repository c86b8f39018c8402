"""The ttft benchmark's timing: the same steps through every mode, interleaved, and how much communication was hidden.

All prompts of a step arrive together when it starts, so this measures prefill under skew, not queueing. Before each
step all ranks meet, so that modes do not bleed into one another. A prompt's TTFT runs from its own rank's call to its
first token; the median over rounds is reported. By then plans are cached, as compiled kernels are; `plan_ms` is what
one costs, and `plan_cached_ms` what finding it again costs. The mean TTFT's least and most over rounds are kept. It and
the slowest rank's TTFT are also kept over odd and even rounds apart: a mode picked by the ones can be judged by the
others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.bench_main import Progress
from benchmarks.routing_load import counted
from benchmarks.ttft.inputs import Step, Workload
from benchmarks.ttft.row import ServedRequest
from pipemoe.plan.schedule import Facts
from pipemoe.runtime.run import Only
from pipemoe.trace import COMMUNICATION, COMPUTATION, Timeline, overlap_percent

if TYPE_CHECKING:
    import torch

    from pipemoe import Model, World
    from pipemoe.plan.schedule import Plan
    from pipemoe.runtime.lanes import Event


@dataclass(frozen=True, slots=True)
class Measured:
    """One mode on one workload; complete on rank 0."""

    requests: list[ServedRequest]
    duration_s: float  # all steps one after another, each until its last first token
    exposed_comm_s: float | None  # per step, mean over ranks and steps
    overlap_pct: float | None
    timelines: list[Timeline]  # per rank, of the step with most tokens
    more_s: dict[str, float]  # planning, figures over rounds, and the sides of the overlap


@dataclass(frozen=True, slots=True)
class Overlap:
    """One extra pass over the steps, timed operation by operation, and one for each side alone."""

    exposed_comm_s: float
    overlap_pct: float | None
    sides_s: dict[str, float]  # mean per step, until it is over everywhere
    timelines: list[Timeline]


class Bench:
    """The models under test, one per mode with the same weights, and this rank's side of a workload."""

    def __init__(
        self, world: World, models: dict[str, Model], workload: Workload, seed: int, progress: Progress
    ) -> None:
        self._world, self._models, self._workload, self._progress = world, models, workload, progress
        vocab_size = next(iter(models.values())).decoder.vocab_size
        self._sequences = [[p.token_ids(vocab_size, seed) for p in step[world.rank]] for step in workload.steps]

    def measure(self, rounds: int, *, overlap: bool = True) -> dict[str, Measured]:
        """All figures; every rank calls. overlap: also how much communication was hidden, in three more passes."""
        steps, modes = range(len(self._workload.steps)), list(self._models)
        plan_s = {mode: {"plan": self._plan_all(mode), "plan_cached": self._plan_all(mode)} for mode in modes}
        total, done = len(steps) * len(modes) * (rounds + 1 + 3 * overlap), 0
        # [step][round][prompt]
        seconds: dict[str, list[list[list[float]]]] = {mode: [[] for _ in steps] for mode in modes}
        for round_number in range(-1, rounds):  # the first is the warm-up
            first = max(round_number, 0) % len(modes)
            for mode in modes[first:] + modes[:first]:
                for step in steps:
                    ttfts = self._run(mode, step).ttft_seconds
                    if round_number >= 0:
                        seconds[mode][step].append(ttfts)
                    done += 1
                    self._progress.count(
                        done,
                        total,
                        f"{self._workload.name}: "
                        f"{'round ' + str(round_number + 1) if round_number >= 0 else 'warm-up'}, {mode}",
                    )
        measured = {}
        for mode in modes:
            requests, duration_s, over_rounds_s = self._collect(seconds[mode])
            measured[mode] = Measured(requests, duration_s, None, None, [], {**plan_s[mode], **over_rounds_s})
            if overlap:
                hidden = self._overlap(mode)
                done += 3 * len(steps)
                self._progress.count(done, total, f"{self._workload.name}: overlap, {mode}")
                more_s = {**measured[mode].more_s, **hidden.sides_s}
                measured[mode] = Measured(
                    requests, duration_s, hidden.exposed_comm_s, hidden.overlap_pct, hidden.timelines, more_s
                )
        return measured

    def expert_load(self) -> dict[str, float | None]:
        """How the steps' tokens spread over the experts, mean over steps: the same in every mode, so in one more pass
        of one. Every rank calls.
        """
        steps = range(len(self._workload.steps))
        mode = next(iter(self._models))
        found: dict[str, list[float]] = {"active_experts": [], "expert_load_max_over_mean": []}
        for step in steps:
            with counted(self._models[mode]) as loads:
                self._run(mode, step, timeline=Timeline())  # issued call by call
                self._world.all_gather(b"", "end of the counted step")  # its last rows have been counted
            for name, value in loads.figures().items():
                found[name].append(value or 0.0)
        return {name: float(np.mean(values)) for name, values in found.items()}

    def _plan_all(self, mode: str) -> float:
        """Seconds to plan a step; fills the mode's cache of plans."""
        begin = time.perf_counter()
        for step in self._workload.steps:
            self._models[mode].runtime.plans.of_step(Facts(step_lengths(step)))
        return (time.perf_counter() - begin) / len(self._workload.steps)

    def _plan(self, mode: str, step: int) -> Plan:
        return self._models[mode].runtime.plans.of_step(Facts(step_lengths(self._workload.steps[step])))

    def _run(self, mode: str, step: int, **options):
        self._world.all_gather(b"", "start of a step")
        return self._models[mode].prefill(self._sequences[step], **options)

    def _run_timed(self, mode: str, step: int, only: Only) -> Timeline:
        """Every operation of a step timed, until the step is over everywhere."""
        timeline = Timeline()
        if only.computation:
            self._run(mode, step, only=only, timeline=timeline)
        else:  # no model in it
            self._world.all_gather(b"", "start of a step")
            runtime, lengths = self._models[mode].runtime, [len(s) for s in self._sequences[step]]
            source = NoModel(sum(lengths), runtime.shape.hidden, runtime.results_dtype, self._world.device)
            runtime.submit_step(lengths, source, only=only, timeline=timeline).result()
        return timeline

    def _collect(
        self, seconds: Sequence[Sequence[Sequence[float]]]
    ) -> tuple[list[ServedRequest], float, dict[str, float]]:
        """All ranks' requests with their medians over rounds, the time for all steps, and figures over rounds."""
        gathered = [json.loads(p) for p in self._world.all_gather(json.dumps(seconds).encode(), "times to first token")]
        requests, duration_s = [], 0.0
        for s, step in enumerate(self._workload.steps):
            of_ranks = [np.array(of_rank[s]) for of_rank in gathered]  # each [rounds, prompts]
            duration_s += float(np.median(np.max([times.max(axis=1) for times in of_ranks if times.size], axis=0)))
            for prompts, times in zip(step, of_ranks, strict=True):
                medians = np.median(times, axis=0) if times.size else []
                requests += [
                    ServedRequest(p.rank, p.num_tokens, float(t), s) for p, t in zip(prompts, medians, strict=True)
                ]
        return (
            requests,
            duration_s,
            figures_over_rounds([[of_rank[s] for of_rank in gathered] for s in range(len(self._workload.steps))]),
        )

    def _overlap(self, mode: str) -> Overlap:
        """exposed: time with communication under way on a rank and no computation there, mean over ranks and steps.
        overlap: OSU's formula on the time until a step is over everywhere; if ranks share cores, that includes waiting
        for a core.
        """
        sides = (Only(), Only(communication=False), Only(computation=False))
        steps = range(len(self._workload.steps))
        kept = max(steps, key=lambda s: sum(map(sum, step_lengths(self._workload.steps[s]))))
        own = []  # per step: whole, computation alone, communication alone, exposed
        alone: list[list[list]] = []  # per step: both sides' spans
        timelines: list[Timeline] = []
        for step in steps:
            row, alone_rows = [], []
            for only in sides:
                timeline = self._run_timed(mode, step, only)
                row.append(extent_seconds(timeline))
                if only != Only():
                    kinds = COMPUTATION if only.computation else COMMUNICATION
                    alone_rows += Timeline(s for s in timeline.spans if s.op.kind in kinds).as_rows()
                if only == Only():
                    exposed = timeline.exposed_seconds()
                    if step == kept:
                        rows = json.dumps(timeline.as_rows()).encode()
                        timelines = [
                            Timeline.from_rows(json.loads(p)) for p in self._world.all_gather(rows, "timelines")
                        ]
            own.append([*row, exposed])
            alone.append(alone_rows)
        # [R, steps, 4]
        everywhere = np.array([json.loads(p) for p in self._world.all_gather(json.dumps(own).encode(), "overlap")])
        sides_s = dict(
            zip(("step", "computation", "communication"), everywhere[:, :, :3].max(axis=0).mean(axis=0).tolist())
        )
        percent = overlap_percent(*sides_s.values()) if self._world.size > 1 else None
        if all(len(self._plan(mode, step).cohorts) <= 1 for step in steps):
            rows_of = [json.loads(p) for p in self._world.all_gather(json.dumps(alone).encode(), "segments alone")]
            sides_s["segments_alone"] = float(
                np.mean([segments_seconds([rows[step] for rows in rows_of]) for step in steps])
            )
        return Overlap(float(everywhere[:, :, 3].mean()), percent, sides_s, timelines)


class NoModel:
    """The source of a step that only communicates: sums go into a buffer, and nothing is computed."""

    has_side_work = keeps_tensors = writes_rows = False

    def __init__(self, num_tokens: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        import torch

        self._sums = torch.zeros((num_tokens, hidden), dtype=dtype, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # zeroed on another stream than the lanes'

    def begin(self, plan: Plan, rank: int) -> None:
        pass

    def ready(self, cohort: int, layer: int) -> bool:
        return True

    def results(self, cohort: int, start: int, stop: int) -> torch.Tensor:
        return self._sums[start:stop]

    def combined(self, cohort: int, layer: int, event: Event) -> None:
        pass

    def finished(self, cohort: int, seconds: float) -> None:
        pass


def step_lengths(step: Step) -> tuple[tuple[int, ...], ...]:
    """Prompt lengths per rank."""
    return tuple(tuple(p.num_tokens for p in prompts) for prompts in step)


def figures_over_rounds(seconds: Sequence[Sequence[Sequence[Sequence[float]]]]) -> dict[str, float]:
    """The least and the most mean TTFT of a round. With several rounds also, over odd and over even ones (the first is
    odd), the mean of the prompts' medians, and the slowest rank's, mean over steps. seconds:
    [step][rank][round][prompt].
    """
    # each [rounds, prompts]
    prompts = [[np.array(rounds) for rounds in of_ranks if np.size(rounds)] for of_ranks in seconds]
    means = np.concatenate([times for of_ranks in prompts for times in of_ranks], axis=1).mean(axis=1)
    found = {"least_mean_ttft": float(means.min()), "most_mean_ttft": float(means.max())}
    for name, first in (("odd", 0), ("even", 1)) if len(means) > 1 else ():
        medians = [[np.median(times[first::2], axis=0) for times in of_ranks] for of_ranks in prompts]
        found[f"{name}_mean_ttft"] = float(np.concatenate([times for of_ranks in medians for times in of_ranks]).mean())
        found[f"{name}_slowest_rank"] = float(np.mean([max(times.max() for times in of_ranks) for of_ranks in medians]))
    return found


def segments_seconds(rows_of_ranks: Sequence[Sequence[Sequence]]) -> float:
    """The time of a step's operations that ran without the other side, added up: computation on the slowest rank, each
    transfer on the rank that waited least. rows: of Timeline.as_rows.
    """
    took: dict[tuple, list[float]] = {}
    for rows in rows_of_ranks:
        for timeline_row in rows:
            took.setdefault(tuple(timeline_row[:4]), []).append(timeline_row[5] - timeline_row[4])
    return sum(min(seconds) if key[0] in map(int, COMMUNICATION) else max(seconds) for key, seconds in took.items())


def extent_seconds(timeline: Timeline) -> float:
    """From the first operation's begin to the last one's end."""
    return max((s.end for s in timeline.spans), default=0.0) - min((s.begin for s in timeline.spans), default=0.0)
