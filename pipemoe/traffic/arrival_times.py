"""When requests come, at a given mean rate: by a trace's own clock, as a Poisson process, or in bursts.

The same arguments give the same requests at the same times, whoever asks: every rank of a benchmark, and the simulator.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from pipemoe.errors import InputError
from pipemoe.traffic.request_trace import Request

# In bursts, requests come during this share of the time, and a period (a burst and the pause behind it) has so many.
_BURST_SHARE, _BURST_REQUESTS = 0.25, 16


class Arrival(NamedTuple):
    """One request, before anybody serves it."""

    number: int
    seconds: float  # after the first
    num_tokens: int


def arrivals_of(process: str, requests: Sequence[Request], rate: float, seed: int = 0) -> list[Arrival]:
    """The requests, `rate` a second on average. All processes take the requests' lengths in the trace's order.

    process: "trace" (its own clock, so much faster or slower that the rate is met), "poisson", or "on_off" (Poisson at
    four times the rate in bursts, silence in between). rate: infinite if all come at once. seed: of random times.
    Raises InputError.
    """
    if process not in PROCESSES:
        raise InputError(f"arrivals {process!r}: must be one of {', '.join(PROCESSES)}")
    if not requests:
        raise InputError("no requests, so none can arrive")
    if not rate > 0:
        raise InputError(f"a rate of {rate} requests a second: must be positive")
    times = itertools.repeat(0.0) if math.isinf(rate) else PROCESSES[process](requests, rate, random.Random(seed))
    return [
        Arrival(number, seconds, request.input_tokens)
        for number, (request, seconds) in enumerate(zip(requests, times, strict=False))
    ]


def natural_rate(requests: Sequence[Request]) -> float:
    """Requests a second by the trace's own clock; infinite where all have the same time."""
    span_ms = requests[-1].timestamp_ms - requests[0].timestamp_ms
    return (len(requests) - 1) * 1e3 / span_ms if span_ms > 0 else math.inf


def _trace(requests: Sequence[Request], rate: float, _: random.Random) -> Iterator[float]:
    own = natural_rate(requests)
    faster = 1.0 if math.isinf(own) else rate / own
    return ((request.timestamp_ms - requests[0].timestamp_ms) / 1e3 / faster for request in requests)


def _poisson(_: Sequence[Request], rate: float, draw: random.Random) -> Iterator[float]:
    seconds = 0.0
    while True:
        yield seconds
        seconds += draw.expovariate(rate)


def _on_off(_: Sequence[Request], rate: float, draw: random.Random) -> Iterator[float]:
    """A Poisson process in time that passes only during bursts; bursts and pauses have exponential lengths."""
    burst_s = _BURST_REQUESTS / rate * _BURST_SHARE
    pause_s = _BURST_REQUESTS / rate * (1 - _BURST_SHARE)
    seconds, left = 0.0, draw.expovariate(1 / burst_s)
    while True:
        yield seconds
        wait = draw.expovariate(rate / _BURST_SHARE)
        while wait > left:
            seconds += left + draw.expovariate(1 / pause_s)
            wait -= left
            left = draw.expovariate(1 / burst_s)
        seconds += wait
        left -= wait


PROCESSES: dict[str, Callable[[Sequence[Request], float, random.Random], Iterator[float]]] = {
    "trace": _trace,
    "poisson": _poisson,
    "on_off": _on_off,
}
