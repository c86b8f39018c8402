"""Ways to form cohorts: those that mode "auto" chooses from, and those of the fixed modes. Compiled for mode auto; the
fixed modes run them as plain Python.

A unit stays together if possible: a whole rank's tokens, or one sequence. Units are sorted by length. They are split at
the largest relative gaps, or into groups of equal count, or cut into causal chunks; each part is a cohort.
"""

from __future__ import annotations

import numpy as np

from pipemoe.plan.compiled import compiled_part
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.schedule import Facts, Microbatch

ONE, GAPS, EVEN, SIMILAR, CHUNKS, LONG_IN_CHUNKS = 0, 1, 2, 3, 4, 5
EACH = 0  # parts: as many as there are units
RANK, SEQUENCE = 0, 1  # the unit; with one sequence per rank they are the same
# Mode auto's: kind, parts, unit. Others were tried and gained too little: see docs/results.md.
CANDIDATES = np.array(
    [
        (ONE, 1, RANK),
        (GAPS, 2, RANK),
        (GAPS, 3, RANK),
        (EVEN, 3, RANK),
        (SIMILAR, 0, RANK),
        (CHUNKS, 2, RANK),
        (LONG_IN_CHUNKS, 2, RANK),
        (LONG_IN_CHUNKS, 4, RANK),
        (GAPS, 2, SEQUENCE),
        (GAPS, 3, SEQUENCE),
        (EVEN, 2, SEQUENCE),
        (LONG_IN_CHUNKS, 2, SEQUENCE),
    ],
    dtype=np.int64,
)
# Those that cut no sequence; the others are one cohort here, which comes first and so is looked at once.
WHOLE_CANDIDATES = np.where(CANDIDATES[:, :1] < CHUNKS, CANDIDATES, CANDIDATES[0])
# The others have one cohort.
FIXED_MODES = {"two_batch": (CHUNKS, 2, RANK), "per_rank": (EVEN, EACH, RANK), "pipelined": (SIMILAR, 0, RANK)}
MOST_RATIO = 1 << 31  # no token count is larger, and products with one fit int64
Assignment = list[list[Microbatch]]  # of each cohort, the one with the highest priority first
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
    return _NAMES[kind].format(parts=parts, unit=("rank", "sequence")[unit])


def fixed_assignment(facts: Facts, config: PlanConfig) -> Assignment:
    """The cohorts of a fixed mode. Compiles nothing."""
    if not any(facts.tokens):
        return []
    kind = FIXED_MODES.get(config.mode, (ONE, 1, RANK))
    if kind[0] == CHUNKS and config.whole_sequences:
        several = sum(map(len, facts.lengths)) > 1
        kind = (EVEN, kind[1], SEQUENCE) if several else (ONE, 1, RANK)
    starts, first = facts.flat_boundaries
    tokens = np.array(facts.tokens, np.int64)
    ratio = min(config.pipelined_ratio, MOST_RATIO)
    units = units_of(tokens, starts, first, kind[2])
    return assignment_of(candidate_microbatches(*kind[:2], units, tokens, ratio, config.num_slots))


def assignment_of(microbatches: np.ndarray) -> Assignment:
    """From the table of candidate_microbatches."""
    assignment: Assignment = [[] for _ in range(microbatches[-1, 0] + 1)]
    for cohort, rank, start, stop in microbatches.tolist():
        assignment[cohort].append(Microbatch(rank, start, stop))
    return assignment


@compiled_part
def units_of(tokens, starts, first, by_sequence):
    """Whole ranks, or sequences: [U, 3] = rank, start, stop."""
    units = np.empty((len(starts), 3), np.int64)
    count = 0
    for r in range(len(tokens)):
        if by_sequence:
            for s in range(first[r], first[r + 1] - 1):
                units[count, 0], units[count, 1], units[count, 2] = r, starts[s], starts[s + 1]
                count += 1
        elif tokens[r]:
            units[count, 0], units[count, 1], units[count, 2] = r, 0, tokens[r]
            count += 1
    return units[:count]


@compiled_part
def stable_order(values):
    """Indices that sort `values`, equal ones in order. A merge sort: numba's own takes seconds to compile."""
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
    """The candidate's microbatches: int64 [M, 4] = cohort, rank, start, stop, by cohort and in wave order. None if the
    candidate does not apply.

    units [U, 3]: rank, start, stop, by rank and start, none empty. SIMILAR: neighbours in length share a cohort while
    the longest is at most `ratio` times the shortest. It forms at most `num_slots` cohorts: a cohort that queues for a
    slot is worse off than one that travels with longer company.
    """
    num_units = len(units)
    group = _groups_of_units(kind, parts, units, ratio, num_slots)
    of_rank, num_groups = np.empty(num_units, np.int64), 0
    for u in range(num_units):
        of_rank[u] = tokens[units[u, 0]]
        num_groups = max(num_groups, group[u] + 1)
    if num_groups == 0:
        return np.empty((0, 4), np.int64)
    short_ranks_first = stable_order(of_rank)
    # groups from here on are cut
    cut = num_groups - 1 if kind == LONG_IN_CHUNKS else 0 if kind == CHUNKS else num_groups
    num_cohorts = cut + parts if kind >= CHUNKS else num_groups
    out = np.empty((num_units * max(1, parts), 4), np.int64)
    count, cohorts = 0, 0
    for cohort in range(num_cohorts):
        before = count
        for u in short_ranks_first:
            if group[u] != min(cohort, cut):
                continue
            r, start, stop = units[u, 0], units[u, 1], units[u, 2]
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


@compiled_part
def _groups_of_units(kind, parts, units, ratio, num_slots):
    """[U]: the group of each unit, the shortest units in group 0; -1 if the candidate does not apply."""
    num_units = len(units)
    lengths, group = np.empty(num_units, np.int64), np.zeros(num_units, np.int64)
    for u in range(num_units):
        lengths[u] = units[u, 2] - units[u, 1]
    by_length = stable_order(lengths)
    if kind == EVEN:
        parts = num_units if parts == EACH else parts
        for place in range(num_units):
            group[by_length[place]] = place * parts // num_units if num_units >= parts else -1
    elif kind == SIMILAR:
        cohort, shortest = 0, lengths[by_length[0]]
        for place in range(num_units):
            length = lengths[by_length[place]]
            if length > ratio * shortest and cohort + 1 < num_slots:
                cohort, shortest = cohort + 1, length
            group[by_length[place]] = cohort
    elif kind == GAPS or kind == LONG_IN_CHUNKS:
        split = _widest_gaps(lengths, by_length, 1 if kind == LONG_IN_CHUNKS else parts - 1)
        cohort = 0 if len(split) else -1
        for place in range(num_units):
            cohort += 1 if len(split) and split[place] else 0
            group[by_length[place]] = cohort
    return group


@compiled_part
def _widest_gaps(lengths, by_length, num_gaps):
    """[U]: does a group begin at this place in order of length? Empty if there are fewer gaps than that."""
    split = np.zeros(len(lengths), np.bool_)
    for _ in range(num_gaps):
        widest = 0
        for place in range(1, len(lengths)):
            if split[place] or lengths[by_length[place]] == lengths[by_length[place - 1]]:
                continue
            wider = widest == 0 or (
                lengths[by_length[place]] * lengths[by_length[widest - 1]]
                > lengths[by_length[widest]] * lengths[by_length[place - 1]]
            )
            if wider:
                widest = place
        if widest == 0:
            return split[:0]
        split[widest] = True
    return split
