"""The largest rate that meets the limits, by bisection over rates that are the same for all who are compared.

The definition is DistServe's goodput (Zhong et al., OSDI 2024): a share of the requests must be within a limit on the
time to first token; here of every class of prompt lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipemoe.errors import InputError

LIMIT_FACTOR = 5.0  # a class's limit, in times of its unloaded TTFT


def rates_around(rate: float, lowest: float, highest: float, step: float) -> list[float]:
    """Rates from `lowest * rate` to `highest * rate`, each `step` times the one before, and `rate` among them."""
    if not (rate > 0 and 0 < lowest <= 1 <= highest and step > 1):
        raise InputError(f"rates from {lowest} to {highest} times {rate} in steps of {step}: no such rates")
    below, above = [rate], [rate]
    while below[-1] / step >= lowest * rate * (1 - 1e-9):
        below.append(below[-1] / step)
    while above[-1] * step <= highest * rate * (1 + 1e-9):
        above.append(above[-1] * step)
    return below[:0:-1] + above


def capacity(rates: Sequence[float], meets: Callable[[float], bool], first: int | None = None) -> float | None:
    """The largest of the ascending `rates` that meets the limits, if all below it do; None if the lowest does not.

    first: which rate to try first (default: the middle one).
    """
    low, high = -1, len(rates)  # rates[low] meets, rates[high] does not, as far as is known
    at = len(rates) // 2 if first is None else first
    while high - low > 1:
        if meets(rates[at]):
            low = at
        else:
            high = at
        at = (low + high) // 2
    return rates[low] if low >= 0 else None
