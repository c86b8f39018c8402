"""What a decoder's attention costs on this machine, measured at set-up. Dimensions do not tell it where transformers'
own modules run: their attention may be eager, have windows, be linear, or be a state layer.

Rank 0 speaks for all ranks, as it does for the device's name. It measures while the others wait, so its times are those
of one rank alone. If ranks share a GPU, all attend at once afterwards, which shows how they crowd one another. What
ranks on shared cores cost one another is for the clock to say.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import TYPE_CHECKING

from pipemoe.arguments import look
from pipemoe.errors import ModelError, PipemoeError
from pipemoe.plan.cost.fit import AttendSample, fit_attend
from pipemoe.plan.cost.model import AttendCost, CostModel

if TYPE_CHECKING:
    from pipemoe.world.world import World

_log = logging.getLogger("pipemoe")
COUNTS = (16, 128, 512, 1024, 2048)  # tokens, of one sequence each
_REPEATS = 2  # that are timed, after one that is not
_LONG_NS = 50_000_000  # longer runs are timed once
# At least two counts are tried, and no more that would take as long.
_TOO_LONG_NS = {"cuda": 200_000_000, "cpu": 25_000_000}
# One sequence of so many tokens through some layers: ns that each layer's attention took, and ns to issue it.
Run = Callable[[int], tuple[Sequence[float], Sequence[float]]]
InLane = Callable[[Callable[[], None]], None]


class MeasuredAttention:
    """How to run one decoder's attention, and what was found so far, for all runtimes of the decoder."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._found: dict[int, tuple[AttendCost, int] | None] = {}  # by most_tokens; with HostCost.attend_ns

    def cost(self, world: World, start: CostModel, most_tokens: int, in_lane: InLane) -> CostModel:
        """`start` with attention as measured, or as it is if rank 0's model code fails; every rank calls, and all get
        rank 0's figures. most_tokens: of a step. in_lane(work): runs work where attention runs, and waits for it.
        """
        if most_tokens not in self._found:
            alone, issued = self._alone(world, most_tokens, in_lane)
            # Only ranks that share a GPU crowd one another by default.
            crowded = self._crowded(world, alone, in_lane) if start.attend.crowd_permille else []
            found = None
            if alone:
                issue_ns = issued if world.device.type == "cuda" else 0  # a host's lane computes what it issues
                attend = fit_attend(alone, crowded, start.attend, issue_ns, start.host.graph_rows > 0)
                found = [asdict(attend), issued]
            told = json.loads(world.all_gather(json.dumps(found).encode(), "costs of attention")[0])
            self._found[most_tokens] = (AttendCost(**told[0]), told[1]) if told else None
            _log.info("rank %d: attention measured: %s", world.rank, self._found[most_tokens])
        if (kept := self._found[most_tokens]) is None:
            return start
        attend, attend_ns = kept
        if world.device.type == "cuda":  # a host's conductor hands attention to another thread
            start = replace(start, host=replace(start.host, attend_ns=attend_ns))
        return replace(start, attend=attend)

    def _alone(self, world: World, most_tokens: int, in_lane: InLane) -> tuple[list[AttendSample], int]:
        """On rank 0: what attention took, and ns to issue it."""
        samples: list[AttendSample] = []
        issued: list[float] = []
        too_long_ns = _TOO_LONG_NS[world.device.type]

        def measure() -> None:
            first = 0.0
            for count in sorted({min(count, most_tokens) for count in COUNTS}):
                if len(samples) > 1 and first * count > too_long_ns * samples[-1][0]:
                    break
                first = sum(self._run(count)[0])
                runs = [self._run(count) for _ in range(1 if first > _LONG_NS else _REPEATS)]
                samples.append(_sample(count, min(fmean(took) for took, _ in runs)))
                issued.append(min(fmean(issuing) for _, issuing in runs))

        if world.rank == 0 and not _runs(world, measure, in_lane):
            return [], 0
        return samples, round(min(issued, default=0))

    def _crowded(self, world: World, alone: Sequence[AttendSample], in_lane: InLane) -> list[AttendSample]:
        """The largest sample again, while all ranks attend: the slowest rank's time."""
        count = int(world.all_gather(str(alone[-1][0] if alone else 0).encode(), "timing attention")[0])
        took = [0.0]

        def measure() -> None:
            took.append(fmean(self._run(count)[0]))

        for doing in ("warming up attention", "timing attention of all ranks") if count else ():
            _runs(world, measure, in_lane)
            everywhere = [float(p) for p in world.all_gather(str(took[-1]).encode(), doing)]
        return [_sample(count, max(everywhere))] if count and min(everywhere) else []


def _runs(world: World, measure: Callable[[], None], in_lane: InLane) -> bool:
    """Measure in the lane. False if the model's code raises there; the first step will tell the caller."""
    errors: list[PipemoeError | None] = []
    in_lane(lambda: errors.append(look(world.rank, "timing attention", measure, ModelError)[1]))
    if errors[0] is not None:
        _log.info("%s", errors[0])
    return errors[0] is None


def _sample(count: int, ns: float) -> AttendSample:
    return count, count * (count + 1) // 2, max(1.0, ns)
