"""`pipemoe tune`: measures the costs that plans are chosen by, on this machine, for one model; every rank runs it.

    launch/mpirun.sh -n 4 -m pipemoe.cli tune --model qwen3-30b-a3b --out cost.json

1. Single operations at a handful of sizes, timed in steps of one cohort: attention on one rank, experts on all, dispatch and
   combine from when the last rank is ready, and what issuing takes the engine's thread.
2. Whole steps in several modes, to which contention is fitted (pipemoe.plan.fit).
"""

from __future__ import annotations

import argparse
import json
import math
import socket
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipemoe.config import Config
from pipemoe.errors import InputError
from pipemoe.plan.cost import CostModel
from pipemoe.plan.cost_file import write_cost
from pipemoe.plan.dimensions import dimensions_of
from pipemoe.plan.fit import Samples, calibrate, fit_cost
from pipemoe.plan.model_configs import MODEL_CONFIGS
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, OpKind
from pipemoe.plan.simulator import simulate
from pipemoe.runtime.costs import model_key
from pipemoe.trace import Timeline

if TYPE_CHECKING:
    from pipemoe.comm.world import World
    from pipemoe.model import Model

_LAYERS = 4
_WHOLE_STEP_MODES = ("broadcast", "two_batch", "pipelined", "per_rank")
_Lengths = tuple[tuple[int, ...], ...]  # per rank


def add_tune_parser(subcommands: argparse._SubParsersAction, positive: type) -> None:
    parser = subcommands.add_parser(
        "tune",
        help="measure this machine's costs, for mode auto",
        description="Run it under the launcher with as many ranks as will be used: launch/mpirun.sh -n N -m pipemoe.cli tune ...",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--model", required=True, help=f"{', '.join(MODEL_CONFIGS)}, or the path of a checkpoint's config.json")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="for the costs; Config(cost=FILE) uses them")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--max-tokens", type=positive, help="most tokens of a rank that are tried (default: 512 on a CPU, else 4096)")
    parser.add_argument("--slots", type=positive, help="cohorts under way at once (default: PIPEMOE_NUM_SLOTS, else 4)")
    parser.add_argument("--combine", choices=("reduce", "gather"), default="reduce")
    parser.add_argument("--repeats", type=positive, default=3, help="of each measurement (default %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Measure, fit, write the file on rank 0."""
    import torch

    import pipemoe

    config = _model_config(options.model)
    first_moe = int(config.get("first_k_dense_replace", 0))
    cut = {**config, "num_hidden_layers": min(config["num_hidden_layers"], first_moe + _LAYERS)}
    dtype = getattr(torch, options.dtype) if options.dtype else None
    with pipemoe.init(options.device, num_slots=options.slots) as world:
        most = options.max_tokens or (512 if world.device.type == "cpu" else 4096)
        base = Config(mode="broadcast", max_tokens_per_rank=most, moe_max_num_tokens=most, num_slots=world.num_slots, combine=options.combine)
        _say(world, f"loading {_LAYERS} layers of {options.model}")
        model = pipemoe.load_model(cut, world, config=base, dtype=dtype)
        tuner = Tuner(world, model, most, options.repeats)
        samples = tuner.measure_operations()
        cost = fit_cost(samples, model.runtime.cost, model.runtime.shape, world.size)
        steps = tuner.measure_steps(base)
        before = tuner.log_error(cost, steps)
        cost = calibrate(cost, lambda trial: tuner.log_error(trial, steps))
        after = tuner.log_error(cost, steps)
        if world.rank == 0:
            subject = {**model.runtime.cost_subject, "model": model_key(dimensions_of(config))}
            write_cost(options.out, subject, cost)
            _say(world, f"error of predicted steps: {_percent(before)} as measured, {_percent(after)} with contention fitted")
            print(f"costs: {options.out}")
        world.all_gather(b"", "end of tuning")
    return 0


def _model_config(name: str) -> dict[str, Any]:
    if name in MODEL_CONFIGS:
        return dict(MODEL_CONFIGS[name])
    try:
        return dict(json.loads(Path(name).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"--model {name}: {error}; give one of {', '.join(MODEL_CONFIGS)}, or the path of a config.json") from None


def _say(world: World, text: str) -> None:
    if world.rank == 0:
        print(f"pipemoe tune: {text}", file=sys.stderr, flush=True)


def _percent(log_error: float) -> str:
    return f"{100 * math.expm1(log_error):.0f} %"


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
            _say(self._world, f"operations: {done + 1} of {len(cases)}, tokens per rank {[sum(of_rank) for of_rank in lengths]}")
            for repeat in range(self._repeats + 1):
                timelines = self._timed(lengths)
                if repeat:  # the first is the warm-up
                    self._take(samples, lengths, timelines)
        return samples

    def measure_steps(self, base: Config) -> list[tuple[Config, _Lengths, list[float]]]:
        """Whole steps: configuration, sequences, and ns to the first token per rank."""
        size, n = self._world.size, self._most
        cases: list[_Lengths] = [((n,), *((max(n // 64, 1),),) * (size - 1)), ((max(n // 2, 1),),) * size]
        cases.append(tuple((max(n * (rank + 1) // size, 1),) for rank in range(size)))
        found = []
        for mode in _WHOLE_STEP_MODES if size > 1 else ("broadcast", "two_batch"):
            config = replace(base, mode=mode)
            model = self._model.with_config(config)
            for lengths in cases:
                _say(self._world, f"whole steps: mode {mode}, tokens per rank {[sum(of_rank) for of_rank in lengths]}")
                times = []
                for repeat in range(self._repeats + 1):
                    self._world.all_gather(b"", "start of a step")
                    seconds = model.prefill(self._sequences(lengths)).ttft_seconds
                    times += [seconds] if repeat else []
                own = statistics.median(max(t, default=0.0) for t in times) * 1e9
                found.append((config, lengths, [json.loads(p) for p in self._world.all_gather(json.dumps(own).encode(), "times")]))
        return found

    def log_error(self, cost: CostModel, steps: Sequence[tuple[Config, _Lengths, list[float]]]) -> float:
        """Mean over steps and ranks of |log(predicted / measured)|."""
        errors = []
        for config, lengths, measured in steps:
            predicted = simulate(plan(Facts(lengths), self._model.runtime.shape, config, cost), cost).ttft
            errors += [abs(math.log(p / m)) for p, m in zip(predicted, measured) if p and m]
        return statistics.fmean(errors)

    def _sequences(self, lengths: _Lengths) -> list[list[int]]:
        vocabulary = self._model.decoder.vocab_size
        return [[(i * 31 + 7) % vocabulary for i in range(n)] for n in lengths[self._world.rank]]

    def _timed(self, lengths: _Lengths) -> list[tuple[Timeline, list]]:
        """All ranks' spans and issue times of one step."""
        timeline = Timeline()
        self._world.all_gather(b"", "start of a step")
        self._model.prefill(self._sequences(lengths), timeline=timeline)
        own = json.dumps([timeline.as_rows(), [[int(op.kind), op.layer, seconds] for op, seconds in timeline.issue_seconds]])
        everywhere = [json.loads(p) for p in self._world.all_gather(own.encode(), "timelines")]
        return [(Timeline.from_rows(rows), issued) for rows, issued in everywhere]

    def _transfer_ns(self, timelines: list[Timeline], kind: OpKind) -> float:
        """From when the last rank was ready until it is over everywhere; between hosts, whose clocks differ, for the rank that
        waited least. The mean of a step's, since each holds up the next."""
        of_op: dict = {}
        for timeline in timelines:
            for s in timeline.spans:
                if s.op.kind is kind and s.op.layer:
                    of_op.setdefault(s.op, []).append(s)
        if self._one_host:
            found = [max(s.end for s in spans) - max(s.begin for s in spans) for spans in of_op.values()]
        else:
            found = [min(s.end - s.begin for s in spans) for spans in of_op.values()]
        return max(1.0, statistics.fmean(found) * 1e9)

    def _take(self, samples: Samples, lengths: _Lengths, timed: list[tuple[Timeline, list]]) -> None:
        """Means over the layers after the first, which also embeds the tokens."""
        rows = sum(map(sum, lengths))
        first = timed[0][0]
        if all(not of_rank for of_rank in lengths[1:]):  # several ranks at once may share cores
            pairs = sum(n * (n + 1) // 2 for n in lengths[0])
            samples.attend.append((rows, pairs, _mean(first, OpKind.ATTEND)))
            samples.finish.append(1e9 * next(s.end - s.begin for s in first.spans if s.op.kind is OpKind.FINISH))
        sharing = self._model.runtime.cost.sharing
        shared = max(1.0, self._world.size * 1000 / sharing.capacity_permille) if sharing.across_ranks else 1.0
        samples.experts.append((rows, statistics.median(_mean(timeline, OpKind.EXPERTS) for timeline, _ in timed) / shared))
        segments = sum(1 for of_rank in lengths if of_rank)
        for kind, into in ((OpKind.DISPATCH, samples.dispatch), (OpKind.COMBINE, samples.combine)):
            into.append((segments, rows, self._transfer_ns([timeline for timeline, _ in timed], kind)))
        issued = timed[0][1]
        is_graph = sum(lengths[0]) <= self._model.runtime.cost.host.graph_rows
        names = {OpKind.ATTEND: "graph" if is_graph else "attend", OpKind.EXPERTS: "experts", OpKind.COMBINE: "combine", OpKind.FINISH: "finish"}
        for kind, layer, seconds in issued:
            if OpKind(kind) in names and (layer or kind == OpKind.FINISH):
                samples.host.setdefault(names[OpKind(kind)], []).append(seconds * 1e9)
        for kind, layer, seconds in timed[-1][1] if self._world.size > 1 and not lengths[-1] else []:
            if layer and OpKind(kind) in (OpKind.DISPATCH, OpKind.ATTEND):
                samples.host.setdefault("dispatch" if kind == OpKind.DISPATCH else "idle", []).append(seconds * 1e9)


def _mean(timeline: Timeline, kind: OpKind) -> float:
    """ns of an operation after the first layer; at least 1."""
    found = [s.end - s.begin for s in timeline.spans if s.op.kind is kind and s.op.layer]
    return max(1.0, statistics.fmean(found) * 1e9) if found else 1.0
