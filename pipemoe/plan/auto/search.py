"""The search of mode "auto": which candidate, in which form, with how many multiprocessors left. Compiled.

Each candidate first gets lower bounds, from its cohorts' chains of operations and what each rank has to do at least;
those that cannot win by them are not run. What then leads, and one cohort, are also looked at in another form, with
blocks of columns or with waves computed as they arrive or both: that which promises most by itself; and then with
experts that leave the collectives other numbers of multiprocessors than usual.
"""

from __future__ import annotations

import numpy as np

from pipemoe.plan.auto.candidates import candidate_microbatches
from pipemoe.plan.auto.figures import EVENTS, layers_and_events, predict, set_bounds
from pipemoe.plan.clock.arrivals import take_as_they_arrive
from pipemoe.plan.clock.columns import cut_columns, gained_ns
from pipemoe.plan.clock.layer import (
    ALONE,
    COMBINE,
    DISPATCH,
    attention_waits,
    cut_waves,
    layer_costs,
    leaving_sms,
    merge_alike_ranks,
)
from pipemoe.plan.clock.rules import NEVER
from pipemoe.plan.clock.sms import speeds_where_left, usual_sms_left
from pipemoe.plan.compiled import compiled, compiled_look, compiled_part
from pipemoe.plan.cost.model import USUAL
from pipemoe.plan.products import scaled

_MOST_EVENTS = 3_600  # in all: candidates that would take more are not looked at
# the same for candidates that would be the best only if their bounds were nearer than others' were
_DOUBTFUL_EVENTS = 2_600
_LAST_EVENTS = 4_000  # with those for other forms, and other numbers of multiprocessors left
# thousandths by which a candidate must be better for each cohort that it has more: predictions are not exact
COHORT_MARGIN = 30
_FORM_MARGIN = 10  # the same for a form that is not the usual one
_SMS_MARGIN = 10  # the same for multiprocessors left
_LONGEST = 1 << 53  # ns: longer times count as that, so that a thousand of one fit int64
AS_USUAL, NONE, TWICE = 0, 1, 2  # multiprocessors left: usual_sms_left, none, or twice as many as usual


@compiled_part
def in_one_slot(num_cohorts, num_slots):
    return num_cohorts == 1 or num_slots == 1


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


@compiled
def microbatches_of(kind, tokens, starts, first, ratio, num_slots):
    """Of a row of CANDIDATES: see candidate_microbatches."""
    return candidate_microbatches(kind[0], kind[1], units_of(tokens, starts, first, kind[2]), tokens, ratio, num_slots)


@compiled(seconds=20)
def search(kinds, forms, tokens, starts, first, rates, speeds, num_experts, top_k, limits, goal, only_chosen):
    """Which candidate is best in forms[0], AS_USUAL: see _forms in auto.py. Returns figures [N, F, 3, 3] (mean,
    slowest, p50) of every candidate in each of forms [F, 2], AS_USUAL, NONE and TWICE (NEVER: does not apply, is an
    earlier one again, or was not run); the multiprocessors left [N, F, 3]; margins [N]; there [N]: does the candidate
    apply? The best of all; the least slowest time; the events that choosing took; and figures like the first, of
    candidates that were passed over, unless only_chosen.
    """
    num_layers, num_slots = limits[0], limits[2]
    figures, lefts = (
        np.full((len(kinds), len(forms), 3, 3), NEVER, np.int64),
        np.zeros((len(kinds), len(forms), 3), np.int64),
    )
    bounds, price = np.empty((len(kinds), 3), np.int64), np.full(len(kinds), NEVER, np.int64)
    seen, margins = np.zeros(len(kinds), np.int64), np.full(len(kinds), 1000, np.int64)
    guess = np.empty(3, np.int64)
    costs_of, place_of = [], np.full(len(kinds), -1, np.int64)
    many_sequences = False
    for r in range(len(tokens)):
        many_sequences = many_sequences or first[r + 1] - first[r] > 2
    for k in range(len(kinds)):
        if kinds[k, 2] and not many_sequences:
            continue
        microbatches = microbatches_of(kinds[k], tokens, starts, first, goal[4], num_slots)
        if len(microbatches) == 0:
            continue
        mark = np.int64(1)
        for m in range(len(microbatches)):
            for j in range(4):
                mark = mark * 1_000_003 + microbatches[m, j]  # wraps around, the same everywhere
        seen[k], again = mark, False
        for j in range(k):
            again = again or seen[j] == mark
        if again:
            continue
        margins[k] += COHORT_MARGIN * microbatches[-1, 0]
        whole, weight, _, left = _costs_of(microbatches, forms[0], starts, first, rates, num_experts, top_k, limits)
        costs = cut_columns(whole, rates, forms[0, 0])
        lefts[k, 0, AS_USUAL] = left
        set_bounds(costs, weight, rates, speeds[USUAL], num_layers, num_slots, bounds[k], guess)
        price[k] = scaled(_objective(guess, goal), margins[k], 1000)
        place_of[k] = len(costs_of)
        costs_of.append((costs, weight))
    best, lowest, events, looked_at = _place(-1, 0, AS_USUAL), NEVER, 0, place_of < 0
    # thousandths: the least by which a slowest time was above its bound, and a price above its guess
    late, dear = NEVER, NEVER
    for turn in range(len(kinds)):
        allowed = _allowed(lowest, goal) if best[0] >= 0 else NEVER
        # one cohort, then what may end first, as both say how late others may be, then the most promising
        k, doubtful = 0, False
        for j in range(len(kinds)):
            if not turn or looked_at[j]:
                continue
            doubt = turn > 1 and (
                bounds[j, 1] // 1000 * late > allowed or price[j] // 1000 * dear >= _price(figures, margins, goal, best)
            )
            sooner = (
                bounds[j, 1] < bounds[k, 1] if turn == 1 else price[j] < price[k] if doubt == doubtful else doubtful
            )
            if looked_at[k] or sooner:
                k, doubtful = j, doubt
        if looked_at[k]:
            break
        looked_at[k] = True
        if bounds[k, 1] > allowed:
            continue
        least = scaled(_objective(bounds[k], goal), margins[k], 1000)
        if best[0] >= 0 and bounds[k, 1] >= lowest and least >= _price(figures, margins, goal, best):
            continue
        costs, weight = costs_of[place_of[k]]
        needed = layers_and_events(costs, num_layers)[1]
        if turn and (needed > EVENTS + 100 or events + needed > (_DOUBTFUL_EVENTS if doubtful else _MOST_EVENTS)):
            continue
        usual = _place(k, 0, AS_USUAL)
        events += predict(costs, weight, rates, speeds, limits, lefts, usual, figures)
        late = min(late, min(figures[usual][1], _LONGEST) * 1000 // bounds[k, 1])
        dear = min(dear, min(_price(figures, margins, goal, usual), _LONGEST) * 1000 // price[k])
        lowest = min(lowest, figures[usual][1])
        best = _best(figures, margins, _allowed(lowest, goal), goal)
    rest = np.full(figures.shape, NEVER, np.int64)
    if not only_chosen:
        for k in range(len(kinds)):
            if place_of[k] >= 0 and figures[k, 0, AS_USUAL, 1] == NEVER:
                costs, weight = costs_of[place_of[k]]
                predict(costs, weight, rates, speeds, limits, lefts, _place(k, 0, AS_USUAL), rest)
    return figures, lefts, margins, place_of >= 0, best, lowest, events, rest


@compiled(seconds=20)
def try_forms(
    kinds,
    forms,
    tokens,
    starts,
    first,
    rates,
    speeds,
    num_experts,
    top_k,
    limits,
    goal,
    figures,
    lefts,
    margins,
    there,
    best,
    lowest,
    events,
):
    """What `search` found best, and one cohort, in the other forms, and with other multiprocessors left: fills in
    `figures` and `lefts`. Returns the best of all, and the events."""
    num_layers, num_slots, num_ranks, forced = limits[0], limits[2], len(tokens), limits[5]
    leader = best[0]
    for turn in range(4):  # forms, then multiprocessors left, of the leader and then of one cohort
        k, of_sms = 0 if turn > 1 else leader, turn % 2
        if leader < 0 or not there[k] or (turn > 1 and leader == 0):
            continue
        microbatches = microbatches_of(kinds[k], tokens, starts, first, goal[4], num_slots)
        whole, weight, wave_rows, _ = _costs_of(
            microbatches, forms[0], starts, first, rates, num_experts, top_k, limits
        )
        costs = cut_columns(whole, rates, forms[0, 0])
        at, one_slot = _place(k, 0, AS_USUAL), in_one_slot(len(whole.num_waves), num_slots)
        for m in range(1, len(forms)):
            in_form = _place(k, m, AS_USUAL)
            if (
                of_sms
                and figures[in_form][1] < NEVER
                and _price(figures, margins, goal, in_form) < _price(figures, margins, goal, at)
            ):
                at = in_form
        if of_sms and one_slot and forms[at[1], 1]:
            continue  # what arrivals leave is not for choosing
        before = costs
        if at[1]:
            before = cut_columns(
                leaving_sms(whole, wave_rows, rates, num_experts, top_k, num_ranks, lefts[at]), rates, forms[at[1], 0]
            )
        most, other, cut, uncut, arrivals = 0, at, before, whole, forms[0, 1]
        for m in range(1, 3 if of_sms else len(forms)):
            trial = _place(k, at[1] if of_sms else m, m if of_sms else AS_USUAL)
            form = forms[trial[1]]
            if form[1] != arrivals:
                if not one_slot:
                    break
                arrivals = form[1]
                uncut, _, _, _ = _costs_of(microbatches, form, starts, first, rates, num_experts, top_k, limits)
            left = usual_sms_left(rates, whole.num_waves, form[0], num_slots, form[1])
            lefts[trial] = forced if forced >= 0 else left if not of_sms else 0 if m == NONE else 2 * left
            if form[1] and one_slot:
                costs = cut_columns(uncut, rates, form[0])
            else:
                costs = cut_columns(
                    leaving_sms(whole, wave_rows, rates, num_experts, top_k, num_ranks, lefts[trial]), rates, form[0]
                )
            if of_sms:
                used = min(len(whole.num_waves), num_slots)
                tables = (
                    speeds_where_left(rates, speeds, lefts[at], used),
                    speeds_where_left(rates, speeds, lefts[trial], used),
                )
                gained = _gained_by_sms(before, costs, *tables)
            else:
                gained = gained_ns(before, costs)
            if gained * num_layers > most:
                most, other, cut = gained * num_layers, trial, costs
        hoped = scaled(_objective(figures[at] - most, goal), _margin(margins, other), 1000)
        if (
            other == at
            or hoped >= _price(figures, margins, goal, best)
            or events + layers_and_events(cut, num_layers)[1] > _LAST_EVENTS
        ):
            continue
        events += predict(cut, weight, rates, speeds, limits, lefts, other, figures)
        lowest = min(lowest, figures[other][1])
        best = _best(figures, margins, _allowed(lowest, goal), goal)
    return best, events


@compiled_part
def _costs_of(microbatches, form, starts, first, rates, num_experts, top_k, limits):
    """A layer of these cohorts in a form, but not yet in blocks of columns, how many ranks each of its columns stands
    for, the rows of the waves, and how many multiprocessors are left as usual."""
    num_cohorts, num_slots, forced = microbatches[-1, 0] + 1, limits[2], limits[5]
    arrive = form[1] != 0 and in_one_slot(num_cohorts, num_slots)
    segments, wave_rows, num_waves = cut_waves(microbatches, num_cohorts, limits[1])
    waits = attention_waits(microbatches, num_cohorts, starts, first, num_slots)
    left = usual_sms_left(rates, num_waves, form[0], num_slots, arrive) if forced < 0 else forced
    # What arrivals leave is in their own price.
    costs = layer_costs(
        segments,
        wave_rows,
        num_waves,
        waits,
        starts,
        first,
        rates,
        num_experts,
        top_k,
        limits[4] != 0,
        np.int64(2),
        0 if arrive else left,
    )
    if arrive:
        costs = take_as_they_arrive(costs, segments, wave_rows, rates, num_experts, top_k)
    whole, weight = merge_alike_ranks(costs, rates.cores_permille > 0)
    return whole, weight, wave_rows, left


@compiled_look
def _gained_by_sms(before, after, speeds_before, speeds_after):
    """About what a layer of all cohorts gains by leaving other multiprocessors: experts that take another time, and go
    on at another speed beside transfers, as these do beside them, if half of what can run side by side does."""
    computed, moved, gained = 0, 0, 0
    for c in range(len(after.num_waves)):
        for block in range(after.num_waves[c] * after.num_blocks):
            computed += after.compute[c, 0, 1 + block, ALONE]
            gained += before.compute[c, 0, 1 + block, ALONE] - after.compute[c, 0, 1 + block, ALONE]
            moved += after.exchange[c, COMBINE, block, ALONE]
        for w in range(after.num_waves[c]):
            moved += after.exchange[c, DISPATCH, w, ALONE]
    beside = min(computed, moved) // 2
    # experts beside a combine, and the other way round: a dispatch does as that does
    for one, other in ((1, 3), (3, 1)):
        gained += beside * 1000 // speeds_before[0, one, other] - beside * 1000 // speeds_after[0, one, other]
    return gained


@compiled_part
def _place(k, form, left):
    """Of a candidate in `figures`: always three int64, as numba compiles functions anew for every literal in a
    tuple.
    """
    return np.int64(k), np.int64(form), np.int64(left)


@compiled_part
def _objective(figures, goal):
    return (
        min(figures[0], _LONGEST) * goal[0] + min(figures[1], _LONGEST) * goal[1] + min(figures[2], _LONGEST) * goal[2]
    )


@compiled_part
def _allowed(lowest, goal):
    """The latest that the slowest may be."""
    return lowest + min(lowest, _LONGEST) // 1000 * goal[3]


@compiled_part
def _margin(margins, at):
    return margins[at[0]] + (_FORM_MARGIN if at[1] else 0) + (_SMS_MARGIN if at[2] else 0)


@compiled_part
def _price(figures, margins, goal, at):
    """What counts of a candidate `at` (k, form, multiprocessors left): dearer the more cohorts it has, and where not
    all is as usual.
    """
    return scaled(_objective(figures[at], goal), _margin(margins, at), 1000)


@compiled_part
def _best(figures, margins, allowed, goal):
    """Candidate and its choices with the lowest price, among those that end in the time allowed."""
    best = _place(-1, 0, AS_USUAL)
    for n in range(figures.shape[1]):
        for left in range(figures.shape[2]):
            for k in range(len(figures)):
                at = _place(k, n, left)
                if figures[at][1] == NEVER or figures[at][1] > allowed:
                    continue
                if best[0] < 0 or _price(figures, margins, goal, at) < _price(figures, margins, goal, best):
                    best = at
    return best
