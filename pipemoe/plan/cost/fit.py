"""Fits costs to measured times: non-negative least squares on relative errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from pipemoe.plan.cost.model import AttendCost

AttendSample = tuple[int, int, float]  # tokens, pairs of query and key, ns that a layer's attention takes


def least_squares(features: Sequence[Sequence[float]], values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Coefficients >= 0 of the linear model with the smallest squared relative errors; tries every set of columns."""
    matrix, wanted = np.asarray(features, float), np.asarray(values, float)
    if not len(wanted):
        raise ValueError("nothing was measured")
    matrix = matrix / wanted[:, None]
    best, least = np.zeros(matrix.shape[1]), np.inf
    for count in range(1, matrix.shape[1] + 1):
        for columns in combinations(range(matrix.shape[1]), count):
            found = np.linalg.lstsq(matrix[:, columns], np.ones(len(wanted)), rcond=None)[0]
            error = float(np.sum((matrix[:, columns] @ found - 1) ** 2))
            if (found >= 0).all() and error < least * (1 - 1e-6):
                best, least = np.zeros(matrix.shape[1]), error
                best[list(columns)] = found
    return best


def fit_attend(
    alone: Sequence[AttendSample], crowded: Sequence[AttendSample], start: AttendCost, graph_ns: int = 0
) -> AttendCost:
    """`start`, with all that the samples show replaced. Raises ValueError without samples of one rank `alone`.

    crowded: taken while every other rank of the GPU attended to as much. graph_ns: what issuing takes, if attention
    was launched as graphs. The constant part of the samples is then mostly that, and is left out: what issues graphs
    may get faster (see tapes). Otherwise it stays: the clock takes an operation to last as long as issuing it, or as
    its own cost says, whichever is longer.
    """
    fixed, row, pair = least_squares([(1, rows, pairs) for rows, pairs, _ in alone], [ns for *_, ns in alone])
    longer = [
        ns / (fixed + row * rows + pair * pairs) - 1 for rows, pairs, ns in crowded if row * rows + pair * pairs > fixed
    ]
    crowd = max(0, round(1e3 * float(np.median(longer)))) if longer else 0
    # bound by its issuing: what the device alone takes stays unseen
    if fixed <= 1.2 * graph_ns and graph_ns > start.fixed_ns:
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
