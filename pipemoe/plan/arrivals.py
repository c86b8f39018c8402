"""Waves that are computed as they arrive: a rank's own rows first, while the dispatch brings the others'.

    wave                  | rank 2 | rank 0 ...... | rank 3 | rank 1 .... |
    as rank 3 has it      | rank 3 | rank 2 | rank 0 ...... | rank 1 .... |
    its calls of experts  | 0      | 1                                    |

A wave's rows may lie in another order on each rank: a broadcast and a reduce take a segment wherever it lies. An
all-gather does not, so waves in one call are computed whole.
"""

from __future__ import annotations

from pipemoe.plan.schedule import Plan, Wave


def own_rows_first(plan: Plan, wave: Wave, rank: int) -> tuple[Wave, int]:
    """The wave as it lies in the buffers of `rank`, and how many of its rows are computed before the others: 0 where
    all are computed at once. The segments' order stays, as all ranks issue their collectives in it.
    """
    own = sum(s.num_rows for s in wave.segments if s.rank == rank)
    if not plan.arrivals or plan.exchange(wave) == "padded" or own == wave.num_rows:
        return wave, 0
    row_of_own, row_of_others, segments = 0, own, []
    for s in wave.segments:
        if s.rank == rank:
            segments.append(s._replace(row=row_of_own))
            row_of_own += s.num_rows
        else:
            segments.append(s._replace(row=row_of_others))
            row_of_others += s.num_rows
    return Wave(tuple(segments), wave.num_rows), own
