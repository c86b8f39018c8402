"""The forward benchmark's servers: who is in memory with whom, in which order they are visited, and the rows."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bench_main import Progress
from benchmarks.case_server import Server, ServerError, start_undisturbed
from benchmarks.ttft.models import BenchModel
from benchmarks.ttft.table import tokens_text
from pipemoe.doctor import installed_gpus

CHECKOUT = Path(__file__).resolve().parents[1]
PIPEMOE, BEFORE, VLLM = "pipemoe", "pipemoe_before", "vllm"
CASE_SECONDS = 120.0
GIB = 1 << 30
ROOM = 10 * GIB  # of a GPU, for one implementation beside its weights
VLLM_ROOM = 8 * GIB  # of that, what vLLM is told to keep to


def phases_of(impls: Sequence[str], room_for: int) -> list[list[str]]:
    """Which implementations run together, if memory holds `room_for` of them; the first one beside each of the others,
    or each alone.
    """
    if len(impls) <= max(1, room_for):
        return [list(impls)]
    if room_for < 2:
        return [[impl] for impl in impls]
    return [[impls[0], other] for other in impls[1:]]


@dataclass(frozen=True, slots=True)
class Clocks:
    """The first GPU's state right after a visit; None where nobody tells."""

    sm_clock_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None

    @classmethod
    def now(cls) -> Clocks:
        fields = "clocks.sm,power.draw,temperature.gpu"
        query = ["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        try:
            told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
            return cls(*(float(value) for value in told.split(",")))
        except (OSError, subprocess.SubprocessError, ValueError, TypeError):
            return cls()


@dataclass(slots=True)
class Visited:
    """What one implementation did with one case in one phase."""

    rank_ttft_ms: list[list[float | None]] = field(default_factory=list)  # of each round, by rank
    client_ttft_ms: list[float] = field(default_factory=list)
    issue_us: list[float] = field(default_factory=list)  # per layer, of each round
    first_tokens: list[list[int]] = field(default_factory=list)
    clocks: list[Clocks] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    peak_bytes: int | None = None  # of torch's memory in a step, of the rank with most

    def add(self, answer: Mapping[str, Any], clocks: Clocks) -> None:
        """One visit's rounds."""
        self.rank_ttft_ms += answer["rank_ttft_ms"]
        self.client_ttft_ms += answer.get("client_ttft_ms", [])
        self.issue_us += answer.get("issue_us", [])
        self.first_tokens += answer["first_tokens"]
        self.clocks.append(clocks)
        if answer.get("peak_bytes"):
            self.peak_bytes = max(self.peak_bytes or 0, answer["peak_bytes"])

    @property
    def ttft_ms(self) -> list[float]:
        """Of the slowest rank, of each round."""
        return [max(ms for ms in of_ranks if ms is not None) for of_ranks in self.rank_ttft_ms]

    def medians(self) -> list[float | None]:
        """Over the rounds, of each rank; None of a rank without a prompt."""
        return [None if None in of_rank else median(of_rank) for of_rank in zip(*self.rank_ttft_ms)]


def _ms(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.2f}"


class Forward:
    """The benchmark: its servers, and the rows so far."""

    def __init__(
        self,
        options: argparse.Namespace,
        model: BenchModel,
        config: Path,
        progress: Progress,
        keep: Callable[[list[dict[str, Any]]], None],
    ) -> None:
        """keep: called with all rows after each case, should a later one fail."""
        self._options, self._model, self._config, self._progress = options, model, config, progress
        self._keep = keep
        self._servers: dict[str, Server] = {}
        self._hello: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}  # implementation: why
        self.failed = False
        self.rows: list[dict[str, Any]] = []

    def run(self) -> None:
        options = self._options
        impls = [PIPEMOE] + [BEFORE] * (options.before is not None) + [VLLM] * options.vllm
        self._room = self._room_for()
        phases = phases_of(impls, options.at_once or self._room)
        try:
            for number, phase in enumerate(phases, 1):
                for impl in [impl for impl in self._servers if impl not in phase]:
                    self._servers.pop(impl).close()
                wanted = [impl for impl in phase if impl not in self._servers and impl not in self.left_out]
                self._start([impl for impl in wanted if impl != VLLM])
                self._start([VLLM] * (VLLM in wanted))  # alone, as it measures the free memory meanwhile
                for case in options.cases:
                    self._case(number, [impl for impl in phase if impl in self._servers], case)
        finally:
            for server in self._servers.values():
                server.close()

    def _room_for(self) -> int:
        """How many implementations the memory holds at once."""
        gpus = installed_gpus() if self._options.device == "cuda" else []
        if not gpus:
            return 3
        import torch

        from pipemoe.models.loading import PreparedDecoder

        place: dict[str, Any] = {"rank": 0, "num_ranks": self._options.num_ranks, "device": "cpu"}
        dtype = getattr(torch, self._options.dtype)
        prepared = PreparedDecoder(self._config, **place, dtype=dtype, random_weights=True)
        self._weight_bytes, self._gpu_bytes = prepared.num_bytes, gpus[0].memory_mib << 20
        return self._gpu_bytes // ((self._weight_bytes + ROOM) * -(-self._options.num_ranks // len(gpus)))

    def _start(self, impls: Sequence[str]) -> None:
        """Start them side by side, and wait until they are ready."""
        for impl in impls:
            self._progress.say(f"starting {impl}")
            command = self._command(impl)
            with start_undisturbed():
                self._servers[impl] = Server(impl, *command)
        for impl in impls:
            try:
                hello = self._servers[impl].read(self._options.start_seconds)
            except ServerError as error:
                self._drop(impl, error)
                continue
            if "absent" in hello:
                self._servers.pop(impl).close()
                self.left_out[impl] = hello["absent"]
                self._progress.say(f"{impl} is left out: {hello['absent']}")
                continue
            self._hello[impl] = hello
            self._progress.say(f"{impl} is ready: {hello}")

    def _drop(self, impl: str, error: ServerError) -> None:
        self._servers.pop(impl).close()
        self.left_out[impl], self.failed = str(error), True
        self._progress.say(f"{impl} is left out from here on: {error}")

    def _command(self, impl: str) -> tuple[list[str], dict[str, str]]:
        """Words and environment of an implementation's process."""
        options = self._options
        common = [
            *(
                "--model",
                str(self._config),
                "--max-tokens",
                str(max(map(max, options.cases))),
                "--seed",
                str(options.seed),
            ),
            *("--dtype", options.dtype, "--router-skew", str(options.router_skew)),
        ]
        inherited = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        if impl == VLLM:
            script = [sys.executable, str(CHECKOUT / "benchmarks" / "vllm_peer.py"), *common]
            share = (self._weight_bytes + VLLM_ROOM) / self._gpu_bytes if options.device == "cuda" else 0.5
            script += ["--num-ranks", str(options.num_ranks), "--memory", f"{share:.3f}"]
            path = [options.vllm_path] if options.vllm_path else []
        else:
            tree = (options.before if impl == BEFORE else CHECKOUT).resolve()
            launcher = [sys.executable]
            if options.launcher or options.num_ranks > 1:
                words = options.launcher or f"{CHECKOUT / 'launch' / 'mpirun.sh'} -n {options.num_ranks}"
                launcher = shlex.split(words)
            script = [*launcher, str(CHECKOUT / "benchmarks" / "pipemoe_server.py"), *common]
            script += ["--tree", str(tree), "--mode", options.mode, "--device", options.device]
            if options.moe_max_num_tokens:
                script += ["--moe-max-num-tokens", str(options.moe_max_num_tokens)]
            for name in ("cost", "attention"):  # an older tree knows neither, or not all
                value = getattr(options, name)
                script += [f"--{name}", value] * (impl == PIPEMOE and value is not None)
            path = [str(tree), str(tree / "kernels")]
            inherited = [p for p in inherited if Path(p).resolve() not in (CHECKOUT, CHECKOUT / "kernels")]
        return script, {**os.environ, "PYTHONPATH": os.pathsep.join([*path, *inherited])}

    def _case(self, phase: int, impls: Sequence[str], case: Sequence[int]) -> None:
        """Visit everybody twice, A B C C B A, then ask for what is measured outside the timing."""
        options, found = self._options, {impl: Visited() for impl in impls}
        for visit, order in enumerate((impls, impls[::-1])):
            for impl in order:
                request = {
                    "rank_tokens": case,
                    "first": visit * options.rounds,
                    "rounds": options.rounds,
                    "warm_up": options.warm_up,
                    "gap_s": options.gap_ms / 1e3,
                }
                self._ask(found, impl, request)
        for impl in impls:
            if impl != VLLM:
                self._ask(found, impl, {"rank_tokens": case, "first": 0, "figures": True})
        done = [impl for impl in impls if impl in self._servers]
        order = " ".join([*done, *reversed(done)])
        for impl in done:
            self.rows.append(self._row(impl, case, found, phase, order))
        self._keep(self.rows)
        self._progress.say(
            f"{tokens_text(case)} tokens: "
            + ", ".join(f"{impl} {' '.join(map(_ms, found[impl].medians()))} ms" for impl in done)
        )

    def _ask(self, found: Mapping[str, Visited], impl: str, request: Mapping[str, Any]) -> None:
        if impl not in self._servers:
            return
        try:
            answer = self._servers[impl].ask(request, CASE_SECONDS)
        except ServerError as error:
            self._drop(impl, error)
            return
        if "figures" in request:
            found[impl].figures = answer
        else:
            found[impl].add(answer, Clocks.now() if self._options.device == "cuda" else Clocks())

    def _row(
        self, impl: str, case: Sequence[int], found: Mapping[str, Visited], phase: int, order: str
    ) -> dict[str, Any]:
        options, own, hello = self._options, found[impl], self._hello[impl]
        drawn = f"pipemoe's, seed {options.seed}, router skew {options.router_skew:g}"
        weights = hello.get("weights", drawn)
        ours = found.get(PIPEMOE)
        figures, routing_of = own.figures, impl
        if impl == VLLM and ours is not None and weights == drawn:
            figures, routing_of = ours.figures, PIPEMOE
        same = None
        if impl != PIPEMOE and ours is not None and weights == drawn:
            pairs = list(zip(own.first_tokens, ours.first_tokens))
            same = sum(a == b for a, b in pairs) / len(pairs)
        expected = None
        if figures.get("num_experts"):
            counts = figures["num_experts"], figures["top_k"], sum(case)
            from benchmarks.routing_load import expected_active  # with torch, whose import takes seconds

            expected = expected_active(*counts)
        clocks = {
            name: [value for c in own.clocks if (value := getattr(c, name)) is not None]
            for name in ("sm_clock_mhz", "power_w", "temperature_c")
        }
        return {
            "impl": impl,
            "model": self._model.name,
            "layers": self._model.num_layers,
            "dtype": options.dtype,
            "num_ranks": hello["num_ranks"],
            "tokens": max(case),
            "rank_tokens": list(case),
            "ttft_ms": median(own.ttft_ms),
            "ttft_ms_least": min(own.ttft_ms),
            "ttft_ms_most": max(own.ttft_ms),
            "rank_ttft_ms": own.medians(),
            "median_rank_ttft_ms": median(ms for ms in own.medians() if ms is not None),
            "client_ttft_ms": median(own.client_ttft_ms) if own.client_ttft_ms else None,
            "rounds": len(own.ttft_ms),
            "peak_memory_gib": None if own.peak_bytes is None else own.peak_bytes / GIB,
            "issue_us_per_layer": median(own.issue_us) if own.issue_us else own.figures.get("issue_us_per_layer"),
            "active_experts": figures.get("active_experts"),
            "active_experts_expected": expected,
            "expert_load_max_over_mean": figures.get("expert_load_max_over_mean"),
            "routing_of": routing_of,
            "predicted_ttft_ms": own.figures.get("predicted_ttft_ms"),
            "weights": weights,
            "router_skew": options.router_skew,
            "same_first_tokens": same,
            "phase": phase,
            "order": order,
            "ttfts_ms": own.ttft_ms,
            "rank_ttfts_ms": own.rank_ttft_ms,
            "moe_max_num_tokens": options.moe_max_num_tokens,
            **{name: median(values) if values else None for name, values in clocks.items()},
            "sm_clock_mhz_least": min(clocks["sm_clock_mhz"], default=None),
            "mode": hello.get("mode"),
            "version": hello.get("version"),
            "before": options.before.resolve().name if impl == BEFORE else None,
        }
