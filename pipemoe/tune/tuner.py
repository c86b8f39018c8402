"""Runs steps of a model and gathers what they took, for `pipemoe tune`."""

from __future__ import annotations

import json
import math
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pipemoe.arguments import look
from pipemoe.config import Config
from pipemoe.errors import ModelError
from pipemoe.plan.clock.prediction import simulate
from pipemoe.plan.cost.model import CostModel, graph_rows, rates_of
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, OpKind
from pipemoe.plan_report import table
from pipemoe.trace import Span, Timeline
from pipemoe.tune.fit import Samples, Speeds

if TYPE_CHECKING:
    from pipemoe.model import Model
    from pipemoe.models.source import Prefilled
    from pipemoe.world.world import World

_PAIR_SECONDS = 10e-3  # that either side of a pair takes alone
_WHOLE_STEP_MODES = ("broadcast", "chunked", "two_batch", "pipelined", "per_rank")
# in the order of a step of one cohort in one wave
_IN_LAYER = (OpKind.ATTEND, OpKind.DISPATCH, OpKind.EXPERTS, OpKind.COMBINE)
_Lengths = tuple[tuple[int, ...], ...]  # per rank


class _TimedStep(NamedTuple):
    """One rank's step: when it was called, when each operation ran, and how long each took to issue (kind, layer,
    seconds).
    """

    begin: float
    timeline: Timeline
    issued: list[tuple[int, int, float]]


def say(world: World, text: str) -> None:
    if world.rank == 0:
        print(f"pipemoe tune: {text}", file=sys.stderr, flush=True)


def sequences_text(lengths: _Lengths) -> str:
    """Per rank, "64", "16 x 4" for 16 sequences of 4 tokens, or "0"."""
    return ", ".join(f"{len(of_rank)} x {of_rank[0]}" if len(of_rank) > 1 else str(sum(of_rank)) for of_rank in lengths)


class Tuner:
    """Runs steps through a model and gathers what they took, the same on every rank."""

    def __init__(self, world: World, model: Model, most: int, repeats: int) -> None:
        self._world, self._model, self._most, self._repeats = world, model, most, repeats
        self._one_host = len(set(world.all_gather(socket.gethostname().encode(), "host names"))) == 1

    def measure_operations(self) -> Samples:
        """Operations at several sizes."""
        size, samples = self._world.size, Samples()
        counts = [n for n in (1, 16, 64, 256, 1024, 4096, 16384) if n < self._most] + [self._most]
        cases: list[_Lengths] = []
        for n in counts:
            cases += [((n,), *((),) * (size - 1)), ((n,),) * size]
            if n >= 64:
                cases.append(((n // 16,) * 16, *((),) * (size - 1)))
        for done, lengths in enumerate(cases):
            say(self._world, f"operations: {done + 1} of {len(cases)}, tokens per rank [{sequences_text(lengths)}]")
            for repeat in range(self._repeats + 1):
                timelines = self._timed(lengths)
                if repeat:  # the first is the warm-up
                    self._take(samples, lengths, timelines)
        self._take_eager(samples, ((max(2, self._most // 8),),) * size)
        if self._model.runtime.plays_tapes:
            self._take_taped(samples, [n for n in counts if n <= 64])
        return samples

    def _take_taped(self, samples: Samples, counts: Sequence[int]) -> None:
        """What issuing takes in steps whose operations are not timed one by one, and so played from tapes."""
        runtime = self._model.runtime
        for n in counts:
            for repeat in range(self._repeats + 1):
                before = runtime.issued
                self._prefill(self._model, ((n,),))
                self._world.all_gather(b"", "end of a step")  # it has been counted
                if repeat:
                    seconds, layers = (after - b for after, b in zip(runtime.issued, before))
                    samples.taped.append(seconds * 1e9 / layers)

    def _take_eager(self, samples: Samples, lengths: _Lengths) -> None:
        """How long it takes to issue attention that has no graph."""
        say(self._world, "issuing attention without graphs")
        config = replace(self._model.config, mode="two_batch", graph_tokens=0)
        eager = Tuner(self._world, self._model.with_config(config), self._most, self._repeats)
        for repeat in range(2):
            timed = eager._timed(lengths)
            if repeat and self._model.runtime.cost.host.graph_rows:
                issued = [seconds for kind, layer, seconds in timed[0].issued if layer and kind == OpKind.ATTEND]
                samples.host.setdefault("attend", []).extend(seconds * 1e9 for seconds in issued)

    def measure_pairs(self, pairs: Sequence[tuple[str, str]], sms_left: int) -> Speeds:
        """How fast two operations go on side by side, as shares of their speeds alone. sms_left: multiprocessors that
        the experts leave.
        """
        from pipemoe.contention import Operations, Timer, measure_pair

        operations = Operations(
            self._world,
            self._model.decoder,
            self._model.runtime.experts_with_free_sms[0].with_free_sms(sms_left),
            max(self._most // 2, 1),
        )
        timer, found = Timer(self._world), {}
        for a, b in pairs:
            say(self._world, f"side by side: {a} and {b}" + (f", {sms_left} multiprocessors left" if sms_left else ""))
            found[a, b] = measure_pair(timer, operations.pair(a, b), _PAIR_SECONDS, self._repeats).speeds()
        return found

    def measure_steps(self, base: Config) -> list[tuple[Config, _Lengths, list[float]]]:
        """Whole steps: configuration, sequences, and ns to the first token per rank."""
        size, n = self._world.size, self._most
        tokens = [(n, *(n // 64,) * (size - 1)), *((n * part // 128,) * size for part in (48, 6, 1))]
        tokens += [tuple(n // part * (rank + 1) // size for rank in range(size)) for part in (1, 8)]
        cases: list[_Lengths] = [tuple((max(count, 1),) for count in counts) for counts in tokens]
        found = []
        for mode in _WHOLE_STEP_MODES if size > 1 else ("broadcast", "two_batch"):
            config = replace(base, mode=mode)
            if mode == "chunked":  # several waves: a transfer of one beside the experts of another
                config = replace(config, moe_max_num_tokens=max(1, n // 2))
            model = self._model.with_config(config)
            say(self._world, f"whole steps: mode {mode}")
            for lengths in cases:
                times = []
                for repeat in range(self._repeats + 1):
                    self._world.all_gather(b"", "start of a step")
                    seconds = self._prefill(model, lengths).ttft_seconds
                    times += [seconds] if repeat else []
                own = statistics.median(max(t, default=0.0) for t in times) * 1e9
                found.append(
                    (
                        config,
                        lengths,
                        [json.loads(p) for p in self._world.all_gather(json.dumps(own).encode(), "times")],
                    )
                )
        return found

    def log_error(self, cost: CostModel, steps: Sequence[tuple[Config, _Lengths, list[float]]]) -> float:
        """Mean over steps and ranks of |log(predicted / measured)|."""
        errors = []
        for config, lengths, measured in steps:
            predicted = self._predicted(cost, config, lengths)
            errors += [abs(math.log(p / m)) for p, m in zip(predicted, measured) if p and m]
        return statistics.fmean(errors)

    def compared(self, cost: CostModel, steps: Sequence[tuple[Config, _Lengths, list[float]]]) -> list[str]:
        """Each step's ms to the first token per rank, as predicted and as measured: a table's lines."""
        lines = [["mode", "tokens per rank", *(f"rank {rank}" for rank in range(self._world.size))]]
        for config, lengths, measured in steps:
            predicted = self._predicted(cost, config, lengths)
            pairs = [f"{p / 1e6:.1f} ({m / 1e6:6.1f})" if p and m else "-" for p, m in zip(predicted, measured)]
            lines.append([config.mode, sequences_text(lengths), *pairs])
        return ["whole steps, ms predicted (measured):", *table(lines).splitlines()]

    def _predicted(self, cost: CostModel, config: Config, lengths: _Lengths) -> Sequence[int | None]:
        return simulate(plan(Facts(lengths), self._model.runtime.shape, config, cost), cost).ttft

    def _sequences(self, lengths: _Lengths) -> list[list[int]]:
        vocabulary = self._model.decoder.vocab_size
        return [[(i * 31 + 7) % vocabulary for i in range(n)] for n in lengths[self._world.rank]]

    def _prefill(self, model: Model, lengths: _Lengths, **options: Any) -> Prefilled:
        """Run a step. If one rank's model code fails, every rank raises now: next they exchange times, not steps."""
        rank = self._world.rank
        found, error = look(rank, "a step", lambda: model.prefill(self._sequences(lengths), **options), ModelError)
        self._world.agree(error, {}, "seeing that a step went well")
        assert found is not None  # or `agree` has raised
        return found

    def _timed(self, lengths: _Lengths) -> list[_TimedStep]:
        """All ranks' spans and issue times of one step."""
        timeline = Timeline()
        self._world.all_gather(b"", "start of a step")
        begin = time.perf_counter()
        self._prefill(self._model, lengths, timeline=timeline)
        own = json.dumps(
            [begin, timeline.as_rows(), [[int(op.kind), op.layer, seconds] for op, seconds in timeline.issue_seconds]]
        )
        everywhere = [json.loads(p) for p in self._world.all_gather(own.encode(), "timelines")]
        return [_TimedStep(begin, Timeline.from_rows(rows), issued) for begin, rows, issued in everywhere]

    def _take(self, samples: Samples, lengths: _Lengths, timed: list[_TimedStep]) -> None:
        """Means over the layers after the first, which also embeds the tokens."""
        tokens = [sum(of_rank) for of_rank in lengths]
        rows, carried, segments = sum(tokens), sum(tokens) - min(tokens), sum(map(bool, tokens))
        took = self._taken(timed)
        graph = graph_rows(rates_of(self._model.runtime.cost), tokens[0])
        attended = max(tokens[0], graph), sum(n * (n + 1) // 2 for n in lengths[0]), took[OpKind.ATTEND]
        if not any(tokens[1:]):
            samples.attend.append(attended)
            samples.finish.append(
                1e9 * next(s.end - s.begin for s in timed[0].timeline.spans if s.op.kind is OpKind.FINISH)
            )
            first = next(s.end for s in timed[0].timeline.spans if s.op.kind is OpKind.ATTEND and not s.op.layer)
            samples.start.append((*attended[:2], 1e9 * (first - timed[0].begin) - took[OpKind.ATTEND]))
        elif not self._model.runtime.cost.cores.permille:  # cores are shared out by the simulator
            samples.crowded.append(attended)
        samples.experts.append((rows, took[OpKind.EXPERTS]))
        samples.dispatch.append((segments, carried if self._world.size > 1 else 0, took[OpKind.DISPATCH]))
        samples.combine.append((segments, rows, took[OpKind.COMBINE]))
        names = {
            OpKind.ATTEND: "graph" if graph else "attend",
            OpKind.EXPERTS: "experts",
            OpKind.COMBINE: "combine",
            OpKind.FINISH: "finish",
        }
        for kind, layer, seconds in timed[0].issued:
            if OpKind(kind) in names and (layer or kind == OpKind.FINISH):
                samples.host.setdefault(names[OpKind(kind)], []).append(seconds * 1e9)
        for kind, layer, seconds in timed[-1].issued if self._world.size > 1 and not lengths[-1] else []:
            if layer and OpKind(kind) in (OpKind.DISPATCH, OpKind.ATTEND):
                samples.host.setdefault("dispatch" if kind == OpKind.DISPATCH else "idle", []).append(seconds * 1e9)

    def _taken(self, timed: list[_TimedStep]) -> dict[OpKind, float]:
        """ns that each operation of a layer took, mean over layers.

        If the step waits for the devices, an operation takes from the last rank's end of the one before to the last
        rank's end of this one, so that they add up to the step. Otherwise (launches come too late, clocks differ
        between hosts, or ranks share cores) each counts by itself, a transfer from when the last rank was ready.
        """
        layers = range(1, self._model.runtime.shape.num_layers)
        spans: dict[tuple[OpKind, int], list[Span]] = {}
        for step in timed:
            for s in step.timeline.spans:
                spans.setdefault((s.op.kind, s.op.layer), []).append(s)
        end = {key: max(s.end for s in of_op) for key, of_op in spans.items()}
        cores = self._model.runtime.cost.cores.permille
        took: dict[OpKind, list[float]] = {kind: [] for kind in _IN_LAYER}
        issuing = max(sum(seconds for _, layer, seconds in step.issued if layer in layers) for step in timed)
        if self._one_host and not cores and end[OpKind.COMBINE, layers[-1]] - end[OpKind.COMBINE, 0] > 1.2 * issuing:
            for layer in layers:
                at = end[OpKind.COMBINE, layer - 1]
                for kind in _IN_LAYER:
                    took[kind].append(end[kind, layer] - at)
                    at = end[kind, layer]
        else:
            shared = max(1.0, 1000 * self._world.size / cores) if cores else 1.0
            for layer in layers:
                of_kind = {kind: spans[kind, layer] for kind in _IN_LAYER}
                took[OpKind.ATTEND].append(max(s.end - s.begin for s in of_kind[OpKind.ATTEND]))
                took[OpKind.EXPERTS].append(
                    statistics.median(s.end - s.begin for s in of_kind[OpKind.EXPERTS]) / shared
                )
                for kind in (OpKind.DISPATCH, OpKind.COMBINE):
                    waited = [s.end - s.begin for s in of_kind[kind]]
                    took[kind].append(
                        end[kind, layer] - max(s.begin for s in of_kind[kind]) if self._one_host else min(waited)
                    )
        return {kind: max(1.0, 1e9 * statistics.fmean(seconds)) for kind, seconds in took.items()}
