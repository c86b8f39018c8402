"""The cohorts that mode "auto" chooses from. Compiled.

A unit is what stays together if it can: a whole rank's tokens, or one sequence. Units are sorted by length; candidates
split them at the largest relative gaps, or into groups of equally many, or cut units into causal chunks, each a cohort
of its own. What the capped fixed modes do is among them.
"""

from __future__ import annotations

import numpy as np

from pipemoe.plan.compiled import compiled_part

ONE, GAPS, EVEN, SIMILAR, CHUNKS, LONG_IN_CHUNKS = 0, 1, 2, 3, 4, 5
EACH = 0  # parts: as many as there are units
# kind, parts, unit (0 rank, 1 sequence; with one sequence per rank they are the same)
CANDIDATES = np.array(
    [
        (ONE, 1, 0),
        (GAPS, 2, 0),
        (GAPS, 3, 0),
        (GAPS, 4, 0),
        (EVEN, 2, 0),
        (EVEN, 3, 0),
        (EVEN, 4, 0),
        (EVEN, EACH, 0),
        (SIMILAR, 0, 0),
        (CHUNKS, 2, 0),
        (LONG_IN_CHUNKS, 2, 0),
        (LONG_IN_CHUNKS, 4, 0),
        (GAPS, 2, 1),
        (GAPS, 3, 1),
        (EVEN, 2, 1),
        (LONG_IN_CHUNKS, 2, 1),
    ],
    dtype=np.int64,
)
_NAMES = {
    ONE: "one cohort",
    GAPS: "{parts} groups of similar {unit}s",
    EVEN: "{parts} groups of as many {unit}s each",
    SIMILAR: "{unit}s of similar length together",
    CHUNKS: "{parts} chunks of every rank",
    LONG_IN_CHUNKS: "short {unit}s, long ones in {parts} chunks",
}


def candidate_name(index: int) -> str:
    """What a user reads."""
    kind, parts, unit = CANDIDATES[index].tolist()
    if kind == EVEN and parts == EACH:
        return f"every {('rank', 'sequence')[unit]} alone"
    return _NAMES[kind].format(parts=parts, unit=("rank", "sequence")[unit])


@compiled_part
def stable_order(values):
    """Indices of `values` from the smallest on, equal ones in order. (A merge sort; numba's own takes seconds to
    compile.)
    """
    order, spare = np.arange(len(values)), np.empty(len(values), np.int64)
    width = 1
    while width < len(values):
        for low in range(0, len(values), 2 * width):
            middle, high = min(low + width, len(values)), min(low + 2 * width, len(values))
            a, b = low, middle
            for at in range(low, high):
                if a < middle and (b == high or values[order[a]] <= values[order[b]]):
                    spare[at] = order[a]
                    a += 1
                else:
                    spare[at] = order[b]
                    b += 1
        order, spare = spare, order
        width *= 2
    return order


@compiled_part
def candidate_microbatches(kind, parts, units, tokens, ratio, num_slots):
    """The candidate's microbatches int64 [M, 4] = cohort, rank, start, stop, by cohort and in wave order; none if it
    does not apply. units [U, 3]: rank, start, stop, without empty ones, by rank and start. ratio, num_slots: of
    SIMILAR, as in mode pipelined."""
    num_units = len(units)
    lengths = np.empty(num_units, np.int64)
    for u in range(num_units):
        lengths[u] = units[u, 2] - units[u, 1]
    by_length = stable_order(lengths)
    group = np.zeros(num_units, np.int64)
    empty = np.empty((0, 4), np.int64)
    if kind == EVEN:
        parts = num_units if parts == EACH else parts
        if num_units < parts:
            return empty
        for place in range(num_units):
            group[by_length[place]] = place * parts // num_units
    elif kind == SIMILAR:
        cohort, shortest = 0, lengths[by_length[0]]
        for place in range(num_units):
            length = lengths[by_length[place]]
            if length > ratio * shortest and cohort + 1 < num_slots:
                cohort, shortest = cohort + 1, length
            group[by_length[place]] = cohort
    elif kind == GAPS or kind == LONG_IN_CHUNKS:
        num_gaps = 1 if kind == LONG_IN_CHUNKS else parts - 1
        split = np.zeros(num_units, np.bool_)
        for _ in range(num_gaps):
            widest = 0
            for place in range(1, num_units):
                if split[place] or lengths[by_length[place]] == lengths[by_length[place - 1]]:
                    continue
                wider = widest == 0 or (
                    lengths[by_length[place]] * lengths[by_length[widest - 1]]
                    > lengths[by_length[widest]] * lengths[by_length[place - 1]]
                )
                if wider:
                    widest = place
            if widest == 0:
                return empty
            split[widest] = True
        cohort = 0
        for place in range(num_units):
            cohort += split[place]
            group[by_length[place]] = cohort
    rank_order = stable_order(tokens)
    num_groups = 1
    for u in range(num_units):
        num_groups = max(num_groups, group[u] + 1)
    # groups from here on are cut
    cut = num_groups - 1 if kind == LONG_IN_CHUNKS else 0 if kind == CHUNKS else num_groups
    num_cohorts = cut + parts if kind >= CHUNKS else num_groups
    out = np.empty((num_units * max(1, parts), 4), np.int64)
    count, cohorts = 0, 0
    for cohort in range(num_cohorts):
        before = count
        for r in rank_order:
            for u in range(num_units):
                if units[u, 0] != r or group[u] != min(cohort, cut):
                    continue
                start, stop = units[u, 1], units[u, 2]
                if group[u] == cut:  # the first chunks take the remainder
                    size, more = (stop - start) // parts, (stop - start) % parts
                    chunk = cohort - cut
                    start += chunk * size + min(chunk, more)
                    stop = start + size + (chunk < more)
                if start == stop:
                    continue
                if count > before and out[count - 1, 1] == r and out[count - 1, 3] == start:
                    out[count - 1, 3] = stop  # neighbours travel as one chunk
                    continue
                out[count, 0], out[count, 1], out[count, 2], out[count, 3] = cohorts, r, start, stop
                count += 1
        cohorts += count > before
    return out[:count].copy()
