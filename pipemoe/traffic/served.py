"""How requests were served: times to first token by class of prompt length, waiting, throughput; and limits on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipemoe.errors import InputError

# Classes of prompt lengths, shortest first, and up to which share of the requests each goes.
CLASS_SHARES = {"short": 0.5, "medium": 0.9, "long": 1.0}
PERCENTILES = (50, 90, 95, 99)
WITHIN_LIMIT = 0.95  # the share of a class's requests that must be within its limit


class Served(NamedTuple):
    """One request and when things happened to it, in seconds after the first arrival. None: it was not served."""

    number: int
    rank: int
    num_tokens: int
    arrival: float
    admitted: float | None
    first_token: float | None
    slot: int | None = None

    @property
    def ttft(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def queueing(self) -> float | None:
        return None if self.admitted is None else self.admitted - self.arrival


class LengthClasses(NamedTuple):
    """Which prompts are short, medium and long: the most tokens of each, but for the last."""

    most_short: int
    most_medium: int

    def of(self, num_tokens: int) -> str:
        return "short" if num_tokens <= self.most_short else "medium" if num_tokens <= self.most_medium else "long"


def length_classes(lengths: Sequence[int]) -> LengthClasses:
    """The shorter half is short, the longest tenth is long. Raises InputError without lengths."""
    if not lengths:
        raise InputError("no requests, so no classes of lengths")
    ordered = sorted(lengths)
    short, medium = (ordered[max(0, round(share * len(ordered)) - 1)] for share in list(CLASS_SHARES.values())[:2])
    return LengthClasses(short, medium)


def ttfts_by_class(served: Sequence[Served], classes: LengthClasses) -> dict[str, list[float]]:
    """Seconds to the first token of what was served; classes without requests are left out."""
    found: dict[str, list[float]] = {}
    for request in served:
        if request.ttft is not None:
            found.setdefault(classes.of(request.num_tokens), []).append(request.ttft)
    return found


def meets(served: Sequence[Served], classes: LengthClasses, limits: Mapping[str, float]) -> bool:
    """Have 95 % of each class's requests their first token within the class's limit, in seconds? One that was not
    served has not.
    """
    requests: dict[str, list[bool]] = {}
    for request in served:
        name = classes.of(request.num_tokens)
        requests.setdefault(name, []).append(request.ttft is not None and request.ttft <= limits[name])
    return all(sum(within) >= WITHIN_LIMIT * len(within) for within in requests.values())


def figures_of(served: Sequence[Served], classes: LengthClasses) -> dict[str, Any]:
    """Percentiles of TTFT, of all and by class, and of waiting until admission, in ms; throughput. None without a
    request.
    """
    figures: dict[str, Any] = _percentiles("ttft_ms", [r.ttft for r in served if r.ttft is not None])
    by_class = ttfts_by_class(served, classes)
    for name in CLASS_SHARES:
        of_class = _percentiles("ttft_ms", by_class.get(name, []))
        figures |= {f"{field}_{name}": value for field, value in of_class.items()}
    figures |= _percentiles("queueing_ms", [r.queueing for r in served if r.queueing is not None])
    done = [r for r in served if r.first_token is not None]
    duration = max((r.first_token or 0.0 for r in done), default=0.0)
    figures |= {
        "requests": len(served),
        "completed": len(done),
        "duration_s": duration,
        "requests_per_s": len(done) / duration if duration > 0 else None,
        "tokens_per_s": sum(r.num_tokens for r in done) / duration if duration > 0 else None,
    }
    return figures


def ttft_curve_ms(served: Sequence[Served]) -> list[float]:
    """The TTFTs' distribution: their percentiles 0, 1, ... 100; empty if nothing was served."""
    ttfts = [r.ttft for r in served if r.ttft is not None]
    return [round(float(v) * 1e3, 3) for v in np.percentile(ttfts, range(101))] if ttfts else []


def _percentiles(name: str, seconds: Sequence[float | None]) -> dict[str, float | None]:
    """Linear between samples, as numpy's."""
    if not seconds:
        return {f"{name}_p{p}": None for p in PERCENTILES}
    values = np.percentile(np.array(seconds, dtype=float), PERCENTILES) * 1e3
    return {f"{name}_p{p}": float(v) for p, v in zip(PERCENTILES, values, strict=True)}
