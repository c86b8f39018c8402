"""What a monitor can read of an engine: a dict, and metrics of prometheus-client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipemoe.errors import ConfigError

if TYPE_CHECKING:
    from pipemoe.models.rounds import DecoderRounds
    from pipemoe.runtime.rolling import RollingLoop
    from pipemoe.serving.requests import Requests


def statistics(loop: RollingLoop, requests: Requests, rounds: DecoderRounds) -> dict[str, Any]:
    """See Engine.statistics. Numbers are read one after another while they change."""
    slots = [
        {
            **asdict(slot.counts),
            "waiting": slot.waiting.num_offered + len(loop.queue),
            "waiting_tokens": slot.waiting.waiting_tokens,
            "waiting_tokens_by_rank": list(slot.waiting_by_rank),
            "lag": slot.lag / 1000,
            "kept_tokens": places.num_rows - places.num_free,
            "most_kept_tokens": places.num_rows,
        }
        for slot, places in zip(loop.slots, rounds.places, strict=True)
    ]
    return {"queued": requests.num_queued, **asdict(requests.totals), "slots": slots}


# Names in the dicts above, whether they only grow, and what they mean.
_OF_RANK = {
    "queued": (False, "Requests that wait to be admitted"),
    "submitted": (True, "Requests submitted"),
    "answered": (True, "Requests answered with a first token"),
    "failed": (True, "Requests answered with an error"),
    "cancelled": (True, "Requests cancelled"),
    "tokens_answered": (True, "Tokens of answered requests"),
    "queue_seconds": (True, "Seconds from submitted to admitted, summed over answered requests"),
    "first_token_seconds": (True, "Seconds from submitted to first token, summed over answered requests"),
}
_OF_SLOT = {
    "rounds": (True, "Rounds agreed on"),
    "rounds_with_work": (True, "Rounds that had chunks of some rank"),
    "tokens": (True, "Tokens of this rank in rounds"),
    "rows": (True, "Tokens of all ranks in rounds"),
    "seconds": (True, "Seconds that rounds took"),
    "waiting": (False, "Sequences with tokens that are not admitted, those in the queue of all slots in each"),
    "waiting_tokens": (False, "Tokens that are not admitted, those in the queue of all slots in each"),
    "lag": (False, "Time of the round under way, as a multiple of what is expected"),
    "kept_tokens": (False, "Tokens that have memory for keys and values"),
}


class Collector:
    """A collector of prometheus-client."""

    def __init__(self, rank: int, read: Callable[[], dict[str, Any]]) -> None:
        try:
            from prometheus_client import core
        except ImportError:
            raise ConfigError("engine.collector() needs prometheus-client; install pipemoe[monitor]") from None
        self._core, self._rank, self._read = core, str(rank), read

    def collect(self) -> Iterator[Any]:
        """Called by the registry."""
        found = self._read()
        for name, (grows, text) in _OF_RANK.items():
            metric = self._family(f"pipemoe_{name}", grows, text, ["rank"])
            metric.add_metric([self._rank], found[name])
            yield metric
        for name, (grows, text) in _OF_SLOT.items():
            metric = self._family(f"pipemoe_slot_{name}", grows, text, ["rank", "slot"])
            for slot, of in enumerate(found["slots"]):
                metric.add_metric([self._rank, str(slot)], of[name])
            yield metric

    def _family(self, name: str, grows: bool, text: str, labels: list[str]) -> Any:
        family = self._core.CounterMetricFamily if grows else self._core.GaugeMetricFamily
        return family(name, text, labels=labels)
