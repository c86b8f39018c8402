"""Fits costs to measured times: non-negative least squares on relative errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from pipemoe.plan.cost.model import AttendCost

AttendSample = tuple[int, int, float]  # tokens, pairs of query and key, ns that a layer's attention takes


_ALIKE = 1e-12  # errors that differ by less are of equal fits; then fewer columns are taken
_SEEN = 1.2  # a time is more than the floor if it is more than so many times the floor


def least_squares(
    features: Sequence[Sequence[float]], values: Sequence[float] | np.ndarray, floor: float = 0.0
) -> np.ndarray:
    """Coefficients >= 0 of the linear model with the smallest squared relative errors; tries every set of columns.

    floor: what no value is below, whatever the model gives. Values at the floor say little, so each set of columns is
    fitted to all values, and to those above it.
    """
    matrix, wanted = np.asarray(features, float), np.asarray(values, float)
    if not len(wanted):
        raise ValueError("nothing was measured")
    matrix, least_of = matrix / wanted[:, None], floor / wanted
    above = wanted > _SEEN * floor
    best, least = np.zeros(matrix.shape[1]), np.inf
    for count in range(1, matrix.shape[1] + 1):
        for columns in combinations(range(matrix.shape[1]), count):
            for some in (matrix, matrix[above]) if above.any() and not above.all() else (matrix,):
                found = np.linalg.lstsq(some[:, columns], np.ones(len(some)), rcond=None)[0]
                error = float(np.sum((np.maximum(matrix[:, columns] @ found, least_of) - 1) ** 2))
                if (found >= 0).all() and error < least * (1 - 1e-6) - _ALIKE:
                    best, least = np.zeros(matrix.shape[1]), error
                    best[list(columns)] = found
    return best


def fit_attend(
    alone: Sequence[AttendSample],
    crowded: Sequence[AttendSample],
    start: AttendCost,
    issue_ns: int = 0,
    by_graphs: bool = False,
) -> AttendCost:
    """`start`, with all that the samples show replaced. Raises ValueError without samples of one rank `alone`.

    crowded: taken while every other rank of the GPU attended to as much. issue_ns: what issuing takes, HostCost's; no
    sample is shorter, and the clock knows that too. by_graphs: the samples are of graphs. If issuing bounds them, what
    they have in common is left out, as issuing may get quicker still (tapes); or they are of what graphs will run.
    """
    fixed, row, pair = least_squares(
        [(1, rows, pairs) for rows, pairs, _ in alone], [ns for *_, ns in alone], 0 if by_graphs else issue_ns
    )
    longer = [
        ns / (fixed + row * rows + pair * pairs) - 1 for rows, pairs, ns in crowded if row * rows + pair * pairs > fixed
    ]
    crowd = max(0, round(1e3 * float(np.median(longer)))) if longer else 0
    # bound by its issuing: what the device alone takes stays unseen
    if by_graphs and fixed <= _SEEN * issue_ns and issue_ns > start.fixed_ns:
        fixed, weights = start.fixed_ns, start.weights_ns
    else:
        weights = min(start.weights_ns, round(fixed))
        fixed = round(fixed) - weights
    return replace(
        start,
        fixed_ns=fixed,
        weights_ns=weights,
        row_ps=round(row * 1e3),
        pair_fs=round(pair * 1e6),
        crowd_permille=crowd,
    )
