"""Mode "auto": which candidate is best. Compiled.

Candidates are priced, and bounded from below without a clock. They run on the clock in a good order; those that cannot
win by their bounds do not run.
"""

from __future__ import annotations

import numpy as np

from pipemoe.plan.auto.candidates import candidate_microbatches, units_of
from pipemoe.plan.auto.figures import layers_and_events, predict, set_bounds
from pipemoe.plan.auto.problem import LONGEST, allowed_ns, best_candidate, objective_ns, price_of
from pipemoe.plan.clock.layer import cut_waves, layer_costs, merge_alike_ranks
from pipemoe.plan.clock.rules import NEVER
from pipemoe.plan.clock.sms import usual_sms_left
from pipemoe.plan.compiled import compiled, compiled_part
from pipemoe.plan.cost.model import USUAL
from pipemoe.plan.cost.tuned import CANDIDATE_EVENTS, COHORT_MARGIN, DOUBTFUL_EVENTS, MOST_EVENTS
from pipemoe.plan.products import scaled
from pipemoe.plan.waits import attention_waits


@compiled
def microbatches_of(kind, tokens, starts, first, ratio, num_slots):
    """Of a row of CANDIDATES: see candidate_microbatches."""
    return candidate_microbatches(kind[0], kind[1], units_of(tokens, starts, first, kind[2]), tokens, ratio, num_slots)


@compiled(seconds=20)
def search(kinds, problem, only_chosen):
    """Looks for the best of the candidates `kinds`.

    Returns figures (see problem.py); lefts [N], how many multiprocessors experts leave; the best candidate, or -1; the
    events that choosing took; and, unless only_chosen, figures of the candidates that were passed over.
    """
    figures, lefts = np.full((len(kinds), 3), NEVER, np.int64), np.zeros(len(kinds), np.int64)
    margins = np.full(len(kinds), 1000, np.int64)
    bounds, price = np.empty((len(kinds), 3), np.int64), np.full(len(kinds), NEVER, np.int64)
    index, priced = _price_all(kinds, problem, lefts, margins, bounds, price)
    there = index >= 0
    best, lowest, events, looked_at = -1, NEVER, 0, index < 0
    # permille: the least by which a slowest time was above its bound, and a price above its guess
    late, dear = NEVER, NEVER
    for turn in range(len(kinds)):
        allowed, best_price = NEVER, NEVER
        if best >= 0:
            allowed, best_price = allowed_ns(lowest, problem), price_of(figures, margins, problem, best)
        k, doubtful = _next_to_run(turn, looked_at, bounds, price, late, dear, allowed, best_price)
        if looked_at[k]:
            break
        looked_at[k] = True
        least = scaled(objective_ns(bounds[k], problem), margins[k], 1000)
        if bounds[k, 1] > allowed or (best >= 0 and bounds[k, 1] >= lowest and least >= best_price):
            continue
        costs, weight = priced[index[k]]
        needed, most = layers_and_events(costs, problem.num_layers)[1], DOUBTFUL_EVENTS if doubtful else MOST_EVENTS
        if turn and (needed > CANDIDATE_EVENTS + 100 or events + needed > most):
            continue
        events += predict(costs, weight, problem, lefts[k], figures[k])
        late = min(late, min(figures[k, 1], LONGEST) * 1000 // bounds[k, 1])
        dear = min(dear, min(price_of(figures, margins, problem, k), LONGEST) * 1000 // price[k])
        lowest = min(lowest, figures[k, 1])
        best = best_candidate(figures, margins, lowest, problem)
    passed_over = np.full(figures.shape, NEVER, np.int64)
    for k in range(0 if only_chosen else len(kinds)):
        if there[k] and figures[k, 1] == NEVER:
            costs, weight = priced[index[k]]
            predict(costs, weight, problem, lefts[k], passed_over[k])
    return figures, lefts, best, events, passed_over


@compiled_part
def _price_all(kinds, problem, lefts, margins, bounds, price):
    """Fill in lefts, margins, bounds and price of every candidate that applies and does not repeat an earlier one.

    Returns index [N] and a list of layer costs with ranks' weights. index: where a candidate's costs are in the list;
    -1: it has none.
    """
    index, marks, guess = np.full(len(kinds), -1, np.int64), np.zeros(len(kinds), np.int64), np.empty(3, np.int64)
    priced: list = []
    tokens, starts, first, num_slots = problem.tokens, problem.starts, problem.first, problem.num_slots
    many_sequences = False
    for r in range(len(tokens)):
        many_sequences = many_sequences or first[r + 1] - first[r] > 2
    for k in range(len(kinds)):
        if kinds[k, 2] and not many_sequences:
            continue
        microbatches = microbatches_of(kinds[k], tokens, starts, first, problem.ratio, num_slots)
        if len(microbatches) == 0:
            continue
        marks[k], again = _mark(microbatches), False
        for j in range(k):
            again = again or marks[j] == marks[k]
        if again:
            continue
        margins[k] += COHORT_MARGIN * microbatches[-1, 0]
        costs, weight, lefts[k] = costs_of(microbatches, problem)
        set_bounds(costs, weight, problem.rates, problem.speeds[USUAL], problem.num_layers, num_slots, bounds[k], guess)
        price[k] = scaled(objective_ns(guess, problem), margins[k], 1000)
        index[k] = len(priced)
        priced.append((costs, weight))
    return index, priced


@compiled_part
def _mark(microbatches):
    """A number that tells cohorts apart. It wraps around, the same everywhere."""
    mark = np.int64(1)
    for m in range(len(microbatches)):
        for j in range(4):
            mark = mark * 1_000_003 + microbatches[m, j]
    return mark


@compiled_part
def _next_to_run(turn, looked_at, bounds, price, late, dear, allowed, best_price):
    """The next candidate. First comes one cohort, then what may end first: both show how late others may be. Then the
    most promising. Also returns whether it is doubtful: it wins only if its bounds are nearer than all others' were.
    """
    k, doubtful = 0, False
    for j in range(len(looked_at)):
        if not turn or looked_at[j]:
            continue
        doubt = turn > 1 and (bounds[j, 1] // 1000 * late > allowed or price[j] // 1000 * dear >= best_price)
        sooner = bounds[j, 1] < bounds[k, 1] if turn == 1 else price[j] < price[k] if doubt == doubtful else doubtful
        if looked_at[k] or sooner:
            k, doubtful = j, doubt
    return k, doubtful


@compiled_part
def costs_of(microbatches, problem):
    """Costs of a layer of these cohorts. Also how many ranks each of its columns stands for, and how many
    multiprocessors are left.
    """
    num_cohorts, num_slots, rates = microbatches[-1, 0] + 1, problem.num_slots, problem.rates
    num_experts, top_k = problem.num_experts, problem.top_k
    segments, wave_rows, num_waves = cut_waves(microbatches, num_cohorts, problem.most_rows)
    starts, first = problem.starts, problem.first
    waits = attention_waits(microbatches, num_cohorts, starts, first, num_slots)
    left = problem.forced_sms_left
    if left < 0:
        left = usual_sms_left(rates, num_waves, num_slots)
    gathered = np.int64(2)  # waves of equal segments
    costs = layer_costs(
        segments, wave_rows, num_waves, waits, starts, first, rates, num_experts, top_k, problem.gather, gathered, left
    )
    whole, weight = merge_alike_ranks(costs, rates.cores_permille > 0)
    return whole, weight, left
