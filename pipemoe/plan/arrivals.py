"""Waves that are computed as they arrive: dispatched in groups, which bring a rank its rows in parts.

    wave              | rank 2 | rank 0 ...... | rank 3 ... | rank 1 ........... |
    groups            | 0                      | 1                               |
    parts of rank 3   | 0                      | own        | 1                  |

Groups are neighbouring segments, the same on all ranks. A rank has its own rows before the dispatch, and the rows of
a group together. A group with one rank's rows alone would use only the links that lead away from that rank, so a group
holds about two ranks' rows or more.

All cohorts run one after another in the first slot. Experts that wait for rows hold multiprocessors, and another
cohort's attention could need them, perhaps the very attention that these rows come from. In one slot a rank has
attended and packed before it waits.
"""

from __future__ import annotations

from typing import NamedTuple

from pipemoe.plan.compiled import compiled_part
from pipemoe.plan.schedule import MAX_GROUPS, Plan, Wave

MAX_PARTS = 8  # of one wave, which the experts' kernel tells apart
INDEX_SMS = 1  # multiprocessors left to the kernel that indexes the rows that have arrived
OWN = -1  # in place of a group: the rank's own rows


class Part(NamedTuple):
    """Rows [start, stop) of a wave, which the dispatch's `group` brings (OWN: they are there before it)."""

    start: int
    stop: int
    group: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


@compiled_part
def most_groups(num_waves):
    """Groups of one dispatch, at most. The next wave's must fit into MAX_GROUPS too."""
    return MAX_GROUPS // min(2, num_waves)


@compiled_part
def groups_for(num_ranks, num_waves):
    """Into how many groups of equal rows a wave is cut, at most, if it has rows of `num_ranks` ranks."""
    return max(1, min(num_ranks // 2, most_groups(num_waves)))


@compiled_part
def group_of(row, num_rows, wave_rows, num_groups):
    """The group of the segment at rows [row, row + num_rows), by where its middle lies. Some groups may stay empty."""
    return (2 * row + num_rows) * num_groups // (2 * wave_rows)


def groups_of(plan: Plan, cohort: int, wave: int) -> tuple[Wave, ...]:
    """A wave's dispatch as one group of collectives, or several if the plan has arrivals. Each is the wave with some of
    its segments.
    """
    num_waves, whole = len(plan.cohorts[cohort].waves), plan.cohorts[cohort].waves[wave]
    if not plan.arrivals or plan.exchange(whole) == "padded":
        return (whole,)
    groups: dict[int, list] = {}
    num_groups = groups_for(len(whole.ranks()), num_waves)
    for s in whole.segments:
        groups.setdefault(group_of(s.row, s.num_rows, whole.num_rows, num_groups), []).append(s)
    return tuple(Wave(tuple(segments), whole.num_rows) for _, segments in sorted(groups.items()))


def parts_of(plan: Plan, cohort: int, wave: int, rank: int) -> tuple[Part, ...]:
    """The parts in which `rank` has a wave's rows, padding included, in the order of the rows."""
    whole = plan.cohorts[cohort].waves[wave]
    if plan.exchange(whole) == "padded":
        size = whole.num_rows // plan.facts.num_ranks
        pieces = [Part(r * size, (r + 1) * size, OWN if r == rank else 0) for r in range(plan.facts.num_ranks)]
    else:
        pieces = [
            Part(s.row, s.row + s.num_rows, OWN if s.rank == rank else number)
            for number, group in enumerate(groups_of(plan, cohort, wave))
            for s in group.segments
        ]
    parts: list[Part] = []
    for piece in pieces:
        if parts and parts[-1].group == piece.group and parts[-1].stop == piece.start:
            piece = parts.pop()._replace(stop=piece.stop)
        parts.append(piece)
    return tuple(parts)
