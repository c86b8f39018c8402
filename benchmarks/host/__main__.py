"""The host path against an older build of it: times to first token of both, in turns, on ranks of this machine.

    git archive 103e9bf | tar -x -C /tmp/before
    python benchmarks/host --before /tmp/before --json benchmarks/results/cpu_2_cores/host.json

Both builds' ranks are started once. Then they measure by turns: in each round each build runs every workload in every
mode once to warm up, and --repeats times. A round gives medians over its repeats; a row has the median over rounds.
Requests of a step arrive together when it starts. Without --before only this checkout is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks import results_schema
from benchmarks.bench_main import Progress, positive
from benchmarks.ttft.inputs import Workload, rank_tokens_workload, trace_workload
from pipemoe.model_facts.known_models import MODEL_CONFIGS
from pipemoe.output_path import check_output_file
from pipemoe.plan.config import MODES

_CHECKOUT = Path(__file__).resolve().parents[2]
_TRACE = _CHECKOUT / "benchmarks" / "traces" / "azure2023_conv.csv"
_LOOK_SECONDS = 0.2  # how often a wait for ranks looks whether they are there


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The host path against an older build, in turns.")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="the older build, as `git archive` makes it")
    parser.add_argument("--ranks", type=positive(int), default=4, help="default: %(default)s")
    parser.add_argument("--modes", default=",".join(MODES), help="default: %(default)s")
    parser.add_argument("--rank-tokens", action="append", metavar="T,T,...", help="a step; may be repeated")
    parser.add_argument("--num-requests", type=int, default=16, help="of the trace (0: no trace; default %(default)s)")
    parser.add_argument("--rounds", type=positive(int), default=5, help="default: %(default)s")
    parser.add_argument("--repeats", type=positive(int), default=3, help="in a round (default %(default)s)")
    parser.add_argument("--moe-max-num-tokens", type=positive(int), default=256, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="results")
    options = parser.parse_args(arguments)
    options.modes = options.modes.split(",")
    if options.json:
        check_output_file("--json", options.json, may_make_folder=True)
    return options


def workloads_of(options: argparse.Namespace) -> list[Workload]:
    ranks = options.ranks
    texts = options.rank_tokens or [
        ",".join(map(str, counts))
        for counts in ([512] + [16] * (ranks - 1), [64] * ranks, [16] * ranks, [1] + [0] * (ranks - 1))
    ]
    found = [rank_tokens_workload(text, ranks) for text in texts]
    if options.num_requests:
        found.append(
            trace_workload(
                str(_TRACE), ranks, first=0, num_requests=options.num_requests, scale=0.1, prompts_per_step=1
            )
        )
    return found


class Build:
    """The ranks of one build, waiting for their turn."""

    def __init__(self, name: str, job: subprocess.Popen, commands: list[Any], results: list[Any]) -> None:
        self.name, self._job, self._commands, self._results = name, job, commands, results
        self.facts = self._read()

    def _read(self) -> list[Any]:
        """A line of every rank."""
        return [json.loads(self._line(result)) for result in self._results]

    def _line(self, result: Any) -> bytes:
        """The pipe does not tell when its rank ends, as it may not have begun to write. The job tells."""
        line = b""
        while not line.endswith(b"\n"):
            if select.select([result], [], [], _LOOK_SECONDS)[0]:
                line += os.read(result.fileno(), 1 << 16)
            elif self._job.poll() is not None:
                raise SystemExit(f"host: the ranks of build {self.name!r} have ended, with status {self._job.poll()}")
        return line

    def run(self, mode: str, steps: list[list[list[int]]]) -> list[list[list[float]]]:
        """[step][rank]: times to first token in seconds."""
        for command in self._commands:
            command.write(json.dumps({"mode": mode, "steps": steps}).encode() + b"\n")
        of_ranks = self._read()
        return [[of_rank[step] for of_rank in of_ranks] for step in range(len(steps))]


@contextmanager
def started(name: str, root: Path, options: argparse.Namespace, max_tokens: int) -> Iterator[Build]:
    """A build's ranks, which end with the context."""
    settings = {
        "model": MODEL_CONFIGS["small"],
        "modes": options.modes,
        "config": {"moe_max_num_tokens": options.moe_max_num_tokens, "max_tokens_per_rank": max_tokens},
    }
    with tempfile.TemporaryDirectory(prefix="pipemoe_host_") as folder, ExitStack() as files:
        for kind in ("commands", "results"):
            for rank in range(options.ranks):
                os.mkfifo(Path(folder, f"{kind}.{rank}"))
        script = Path(__file__).with_name("rank.py")
        job = subprocess.Popen(
            [root / "launch" / "mpirun.sh", "-n", str(options.ranks), script, folder, json.dumps(settings)],
            env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIPEMOE_COMMAND")},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
        )
        try:
            # Both are opened to read and to write: opening one end alone would wait for the rank to open the other, for
            # ever if it ends before.
            pipes: dict[str, list[Any]] = {"commands": [], "results": []}
            for rank in range(options.ranks):
                for kind, how in (("commands", "wb"), ("results", "rb")):
                    descriptor = os.open(Path(folder, f"{kind}.{rank}"), os.O_RDWR)
                    pipes[kind].append(files.enter_context(open(descriptor, how, buffering=0)))
            yield Build(name, job, pipes["commands"], pipes["results"])
            for pipe in pipes["commands"]:
                pipe.close()
            job.wait(60)
        finally:
            if job.poll() is None:
                job.terminate()
                job.wait()


def measure(builds: list[Build], workloads: list[Workload], options: argparse.Namespace) -> list[dict[str, Any]]:
    progress, rows = Progress(0), []
    for workload in workloads:
        steps = [[[p.num_tokens for p in of_rank] for of_rank in step] for step in workload.steps]
        medians: dict[tuple[str, str], list[list[list[float]]]] = {}  # per build and mode: [round][step][rank]
        for round_number in range(options.rounds):
            progress.say(f"{workload.name}: round {round_number + 1} of {options.rounds}")
            for build in builds if round_number % 2 == 0 else builds[::-1]:
                for mode in options.modes:
                    found = build.run(mode, steps * (1 + options.repeats))[len(steps) :]
                    of_steps = [found[s :: len(steps)] for s in range(len(steps))]  # each [repeat][rank][prompt]
                    medians.setdefault((build.name, mode), []).append([_medians(repeats) for repeats in of_steps])
        for (build_name, mode), rounds in medians.items():
            build = next(b for b in builds if b.name == build_name)
            rows.append(_row(build, mode, workload, rounds, options))
    return rows


def _medians(repeats: list[list[list[float]]]) -> list[float]:
    """Per prompt, by rank."""
    return [median(times) for times in zip(*([t for of_rank in ranks for t in of_rank] for ranks in repeats))]


def _row(build: Build, mode: str, workload: Workload, rounds: list, options: argparse.Namespace) -> dict[str, Any]:
    means = [fmean(t for step in steps for t in step) * 1e3 for steps in rounds]
    prompts = [_median_ms(times) for times in zip(*([t for step in steps for t in step] for steps in rounds))]
    lengths = [p.num_tokens for step in workload.steps for of_rank in step for p in of_rank]
    row = {
        "build": build.name,
        "mode": mode,
        "model": "small",
        "num_ranks": options.ranks,
        "rank_tokens": workload.rank_tokens,
        "input_lens": lengths,
        "mean_ttft_ms": median(means),
        "least_mean_ttft_ms": min(means),
        "most_mean_ttft_ms": max(means),
        "ttft_ms": prompts,
        "rounds": options.rounds,
        "repeats": options.repeats,
        "moe_max_num_tokens": options.moe_max_num_tokens,
        "workspace_bytes": max(facts[mode]["workspace_bytes"] for facts in build.facts),
        "init_bytes": max(facts["init_bytes"] for facts in build.facts),
    }
    shown = " ".join(f"{t:.1f}" for t in prompts[: options.ranks])
    print(f"{workload.name:24} {build.name:8} {mode:10} mean {row['mean_ttft_ms']:7.1f} ms  first step: {shown}")
    return row


def _median_ms(times: Sequence[float]) -> float:
    return median(times) * 1e3


def main() -> int:
    options = parse()
    workloads = workloads_of(options)
    max_tokens = max(w.max_tokens_per_rank for w in workloads)
    roots = [("before", options.before)] if options.before else []
    with ExitStack() as jobs:
        builds = [
            jobs.enter_context(started(name, root, options, max_tokens)) for name, root in [*roots, ("now", _CHECKOUT)]
        ]
        document = results_schema.results_document("host", measure(builds, workloads, options))
    if options.json:
        results_schema.write_results(document, options.json)
    results_schema.print_results(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
