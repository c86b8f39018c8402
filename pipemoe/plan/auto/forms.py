"""Mode "auto": tries the leader, and one cohort, in other forms. Compiled.

A form is a number of blocks of columns, and whether waves are computed as they arrive. The most promising other form
runs on the clock; then the same for other numbers of multiprocessors left to collectives.
"""

from __future__ import annotations

from pipemoe.plan.auto.figures import layers_and_events, predict
from pipemoe.plan.auto.problem import AS_USUAL, NONE, best_place, margin_of, objective_ns, place_of, price_of
from pipemoe.plan.auto.search import costs_of, microbatches_of
from pipemoe.plan.clock.columns import cut_columns, gained_ns
from pipemoe.plan.clock.layer import ALONE, COMBINE, DISPATCH, leaving_sms
from pipemoe.plan.clock.rules import NEVER
from pipemoe.plan.clock.sms import speeds_where_left, usual_sms_left
from pipemoe.plan.compiled import compiled, compiled_look, compiled_part
from pipemoe.plan.cost.tuned import LAST_EVENTS
from pipemoe.plan.products import scaled


@compiled(seconds=20)
def try_forms(kinds, forms, problem, figures, lefts, margins, there, best, lowest, events):
    """What `search` found best, and one cohort, in the other forms [F, 2], and with other multiprocessors left. Fills
    in `figures` and `lefts`; returns the best place of all, and the events.
    """
    leader = best[0]
    for turn in range(4):  # forms, then multiprocessors left, of the leader and then of one cohort
        k, of_sms = 0 if turn > 1 else leader, turn % 2
        if leader < 0 or not there[k] or (turn > 1 and leader == 0):
            continue
        at = place_of(k, 0, AS_USUAL)
        for m in range(1, len(forms) if of_sms else 0):
            in_form = place_of(k, m, AS_USUAL)
            if figures[in_form][1] < NEVER and (
                price_of(figures, margins, problem, in_form) < price_of(figures, margins, problem, at)
            ):
                at = in_form
        other, gained, costs, weight = _most_promising(kinds[k], forms, problem, lefts, at, of_sms)
        hoped = scaled(objective_ns(figures[at] - gained, problem), margin_of(margins, other), 1000)
        if (
            other == at
            or hoped >= price_of(figures, margins, problem, best)
            or events + layers_and_events(costs, problem.num_layers)[1] > LAST_EVENTS
        ):
            continue
        events += predict(costs, weight, problem, lefts, other, figures)
        lowest = min(lowest, figures[other][1])
        best = best_place(figures, margins, lowest, problem)
    return best, events


@compiled_part
def _most_promising(kind, forms, problem, lefts, at, of_sms):
    """The place beside `at` that promises to gain most, about how much in ns over all layers, its costs and weights:
    another form, or (of_sms) the same with other multiprocessors left. `at` itself if none gains. Fills in lefts.
    """
    num_slots, rates = problem.num_slots, problem.rates
    microbatches = microbatches_of(kind, problem.tokens, problem.starts, problem.first, problem.ratio, num_slots)
    whole, weight, wave_rows, _ = costs_of(microbatches, forms[0], problem)
    before = cut_columns(whole, rates, forms[0, 0])
    if at[1]:
        before = _in_form(whole, whole, wave_rows, forms[at[1]], lefts[at], problem)
    most, other, cut, uncut, arrivals = 0, at, before, whole, forms[0, 1]
    if of_sms and forms[at[1], 1]:
        return other, most, cut, weight  # with arrivals only the usual number
    for m in range(1, 3 if of_sms else len(forms)):
        trial = place_of(at[0], at[1] if of_sms else m, m if of_sms else AS_USUAL)
        form = forms[trial[1]]
        if form[1] != arrivals:
            arrivals = form[1]
            uncut, _, _, _ = costs_of(microbatches, form, problem)
        usual = usual_sms_left(rates, whole.num_waves, form[0], num_slots, form[1])
        left = usual if not of_sms else 0 if m == NONE else 2 * usual
        lefts[trial] = problem.forced_sms_left if problem.forced_sms_left >= 0 else left
        costs = _in_form(whole, uncut, wave_rows, form, lefts[trial], problem)
        if of_sms:
            used = min(len(whole.num_waves), num_slots)
            speeds_before = speeds_where_left(rates, problem.speeds, lefts[at], used)
            speeds_after = speeds_where_left(rates, problem.speeds, lefts[trial], used)
            gained = _gained_by_sms(before, costs, speeds_before, speeds_after)
        else:
            gained = gained_ns(before, costs)
        if gained * problem.num_layers > most:
            most, other, cut = gained * problem.num_layers, trial, costs
    return other, most, cut, weight


@compiled_part
def _in_form(whole, uncut, wave_rows, form, left, problem):
    """A layer in a form. whole: in the usual one; uncut: with the form's arrivals; neither in blocks of columns."""
    if form[1]:
        return cut_columns(uncut, problem.rates, form[0])
    num_experts, top_k, num_ranks = problem.num_experts, problem.top_k, len(problem.tokens)
    leaving = leaving_sms(whole, wave_rows, problem.rates, num_experts, top_k, num_ranks, left)
    return cut_columns(leaving, problem.rates, form[0])


@compiled_look
def _gained_by_sms(before, after, speeds_before, speeds_after):
    """About what a layer of all cohorts gains by leaving other multiprocessors: the experts take another time, and
    experts and transfers slow one another differently, while half of what can run side by side does.
    """
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
