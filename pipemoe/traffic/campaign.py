"""What a comparison of policies measures, in which order, on whatever plays requests: real ranks, or the simulator.

1. One request at a time, for every policy. A class's limit, unless it is given, is five times the unloaded time to
   first token of the best.
2. All requests of the first seed at once: each policy's throughput. Loads are shares of the best lockstep policy's, in
   tokens: seeds with longer prompts come at a lower rate.
3. The same arrivals at each load. The first seed goes through all policies. Of lockstep, those go on to the other seeds
   and to the capacity that lead there in some way (see `leaders`).
4. Capacity by bisection, over the same rates for all. What is already measured at a rate is not measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple, Protocol

from pipemoe.errors import InputError
from pipemoe.traffic.arrival_times import Arrival, arrivals_of
from pipemoe.traffic.capacity import LIMIT_FACTOR, capacity, rates_around
from pipemoe.traffic.policy import Policy
from pipemoe.traffic.request_trace import Request
from pipemoe.traffic.served import (
    CLASS_SHARES,
    LengthClasses,
    Served,
    figures_of,
    length_classes,
    meets,
    ttft_curve_ms,
    ttfts_by_class,
)


class Limits(NamedTuple):
    """The time to first token that a class's requests should have, in seconds."""

    classes: LengthClasses
    seconds: Mapping[str, float]

    def met_by(self, served: Sequence[Served]) -> bool:
        return meets(served, self.classes, self.seconds)


class Player(Protocol):
    """Serves requests under a policy."""

    def alone(self, policy: Policy, lengths: Sequence[int]) -> list[Served]:
        """One request after another, each on an idle system."""

    def play(self, policy: Policy, arrivals: Sequence[Arrival], stop_at: Limits | None = None) -> list[Served]:
        """All requests, each when it arrives. stop_at: it may end as soon as these limits cannot be met."""


class Settings(NamedTuple):
    processes: tuple[str, ...] = ("trace",)
    loads: tuple[float, ...] = (0.7,)  # of the best lockstep policy's throughput
    seeds: tuple[int, ...] = (0, 1, 2)
    rate_step: float = 1.1  # between the rates of the bisection
    lowest_load: float = 0.05  # and their range
    highest_load: float = 1.4
    per_class: int = 4  # requests of each class that are served one at a time
    find_capacity: bool = True
    limits_ms: tuple[float, ...] | None = None  # of short, medium and long prompts; None: see the module


class Campaign:
    """All measurements, on one player. `rows` grows as they are made."""

    def __init__(
        self,
        player: Player,
        policies: Sequence[Policy],
        requests_of: Callable[[int], Sequence[Request]],
        settings: Settings,
        say: Callable[[str], None] = lambda text: None,
        keep: Callable[[Sequence[Mapping[str, Any]]], None] = lambda rows: None,
    ) -> None:
        """requests_of: a seed's requests. say: is told what has been measured. keep: gets all rows, whenever there is
        another.
        """
        self._player, self._policies, self._settings, self._say = player, list(policies), settings, say
        self._keep = keep
        check_limits(settings.limits_ms)
        self._requests = {seed: list(requests_of(seed)) for seed in settings.seeds}
        every = [r for requests in self._requests.values() for r in requests]
        self.classes = length_classes([r.input_tokens for r in every])
        self.lengths_alone = spread_lengths(every, self.classes, settings.per_class)
        self._known: dict[tuple[Policy, str, int, float], list[Served]] = {}
        self.limits: Limits | None = None
        self.saturation: dict[Policy, float] = {}  # tokens a second
        self.rows: list[dict[str, Any]] = []
        self.kept: dict[Policy, list[Served]] = {}  # the first seed's at the last load, for timelines

    def run(self) -> list[dict[str, Any]]:
        """Measure everything. Returns the rows."""
        settings = self._settings
        self._alone()
        self._saturate()
        further = self._policies
        for process in settings.processes:
            for seed in settings.seeds:
                for load in settings.loads:
                    for policy in further:
                        self._at_load(policy, process, seed, load)
                if seed == settings.seeds[0]:
                    lead = leaders([row for row in self.rows if row["arrivals"] == process])
                    further = [p for p in self._policies if not p.is_lockstep or p.label in lead]
            if settings.find_capacity:
                for seed in settings.seeds:
                    for policy in further:
                        self._capacity(policy, process, seed)
                        self._keep(self.rows)
        return self.rows

    def _alone(self) -> None:
        """Unloaded times of every policy; the best make the limits. The number of tokens a step plays no part there, so
        one of a policy's is enough.
        """
        best: dict[str, float] = {}
        done = set()
        for policy in self._policies:
            if (policy.name, policy.routing) in done:
                continue
            done.add((policy.name, policy.routing))
            served = self._player.alone(policy, self.lengths_alone)
            self.add_alone(policy, served)
            for name, ttfts in ttfts_by_class(served, self.classes).items():
                best[name] = min(best.get(name, float("inf")), median(ttfts))
        missing = {self.classes.of(tokens) for tokens in self.lengths_alone} - set(best)
        if missing:
            raise InputError(f"no request of length class {', '.join(sorted(missing))} was served")
        given = dict(zip(CLASS_SHARES, self._settings.limits_ms or ()))
        limits = {name: given[name] * 1e-3 if given else LIMIT_FACTOR * seconds for name, seconds in best.items()}
        self.limits = Limits(self.classes, limits)
        self._say("limits " + ", ".join(f"{name} {s * 1e3:.0f} ms" for name, s in self.limits.seconds.items()))

    def _saturate(self) -> None:
        requests = self._requests[self._settings.seeds[0]]
        found: dict[Policy, list[Served]] = {}
        for policy in self._policies:
            found[policy] = self._player.play(policy, arrivals_of("trace", requests, float("inf")))
            self.saturation[policy] = figures_of(found[policy], self.classes)["tokens_per_s"] or 0.0
        full_rate = self.full_rate(self._settings.seeds[0])
        for policy, served in found.items():
            rate = self._rate(self._settings.seeds[0], self.saturation[policy])
            self._add(policy, served, {"what": "saturation", "rate_rps": rate, "load": rate / full_rate})

    def full_rate(self, seed: int) -> float:
        """Requests of a seed a second that bring the tokens of the best lockstep policy's saturation; of the best
        policy's where there is none.
        """
        of_lockstep = [rate for policy, rate in self.saturation.items() if policy.is_lockstep]
        return self._rate(seed, max(of_lockstep or self.saturation.values()))

    def _rate(self, seed: int, tokens_per_s: float) -> float:
        requests = self._requests[seed]
        return tokens_per_s * len(requests) / sum(r.input_tokens for r in requests)

    def _served(
        self, policy: Policy, process: str, seed: int, rate: float, stop_at: Limits | None = None
    ) -> list[Served]:
        key = (policy, process, seed, rate)
        if key not in self._known:
            arrivals = arrivals_of(process, self._requests[seed], rate, seed)
            self._known[key] = self._player.play(policy, arrivals, stop_at)
        return self._known[key]

    def _at_load(self, policy: Policy, process: str, seed: int, load: float) -> None:
        rate = load * self.full_rate(seed)
        served = self._served(policy, process, seed, rate)
        if seed == self._settings.seeds[0]:
            self.kept[policy] = served
        about = {"what": "load", "arrivals": process, "seed": seed, "rate_rps": rate, "load": load}
        self._add(policy, served, about | {"ttft_curve_ms": ttft_curve_ms(served)})

    def _capacity(self, policy: Policy, process: str, seed: int) -> None:
        settings, limits = self._settings, self.limits
        assert limits is not None  # _alone came first
        middle = settings.loads[-1] * self.full_rate(seed)
        highest = max(settings.highest_load / settings.loads[-1], 1.0)
        rates = rates_around(middle, min(settings.lowest_load / settings.loads[-1], 1.0), highest, settings.rate_step)
        tried: list[list[Any]] = []

        def meets_limits(rate: float) -> bool:
            within = limits.met_by(self._served(policy, process, seed, rate, limits))
            tried.append([rate, within])
            return within

        found = capacity(rates, meets_limits, rates.index(middle))
        self._say(f"{policy.label}, {process}, seed {seed}: capacity {found and round(found, 2)} requests a second")
        about = {"capacity_rps": found, "capacity_tried": tried}
        for row in self.rows:
            if (row["label"], row["arrivals"], row["seed"]) == (policy.label, process, seed):
                row |= about

    def add_alone(self, policy: Policy, served: Sequence[Served]) -> None:
        """A row of requests that were served one at a time; also by what is no policy of these, to compare with."""
        unknown = {"requests_per_s": None, "tokens_per_s": None, "duration_s": None}
        self._add(policy, served, {"what": "alone", "rate_rps": None, "load": None} | unknown)

    def _add(self, policy: Policy, served: Sequence[Served], about: Mapping[str, Any]) -> None:
        figures = figures_of(served, self.classes)
        row = {
            "policy": policy.name,
            "label": policy.label,
            "routing": policy.routing,
            "step_tokens": policy.step_tokens,
            "arrivals": None,
            "seed": self._settings.seeds[0],
            "capacity_rps": None,
            "limits_ms": None if self.limits is None else {n: s * 1e3 for n, s in self.limits.seconds.items()},
            "most_tokens": self.classes._asdict(),
        }
        self.rows.append({**row, **figures, **about})
        named = ("ttft_ms_p50", "ttft_ms_p95", "ttft_ms_p95_short", "requests_per_s")
        shown = ", ".join(f"{name} {self.rows[-1][name]:.1f}" for name in named if self.rows[-1][name] is not None)
        load = "" if about["load"] is None else f" {about['load']:.2f}"
        self._say(f"{policy.label}, {about['what']}{load}: {shown}")
        self._keep(self.rows)


def check_limits(limits_ms: tuple[float, ...] | None) -> None:
    """Raises InputError if limits are given, but not one over 0 for each length class."""
    if limits_ms is not None and (len(limits_ms) != len(CLASS_SHARES) or not all(limit > 0 for limit in limits_ms)):
        raise InputError(
            f"limits of {', '.join(map(str, limits_ms))} ms: one over 0 is wanted for {', '.join(CLASS_SHARES)} each"
        )


def spread_lengths(requests: Sequence[Request], classes: LengthClasses, per_class: int) -> list[int]:
    """Lengths of each class, evenly spread over the class's requests by length, shortest first."""
    found: list[int] = []
    for name in CLASS_SHARES:
        lengths = sorted(r.input_tokens for r in requests if classes.of(r.input_tokens) == name)
        count = min(per_class, len(lengths))
        found += [lengths[(2 * i + 1) * len(lengths) // (2 * count)] for i in range(count)]
    return found


def leaders(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Labels of the lockstep policies that are best of lockstep in some figure at the highest load: half of all first
    tokens, 95 % of all, 95 % of the short prompts'.
    """
    of_load = [row for row in rows if row["what"] == "load" and row["policy"] != "rolling"]
    highest = max((row["load"] for row in of_load), default=0.0)
    found = set()
    for field in ("ttft_ms_p50", "ttft_ms_p95", "ttft_ms_p95_short"):
        known = [row for row in of_load if row["load"] == highest and row[field] is not None]
        if known:
            found.add(min(known, key=lambda row: row[field])["label"])
    return found
