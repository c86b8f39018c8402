"""How fast this machine's cores are, against those that the default costs of CPUs were fitted on (cost/tuned.py)."""

from __future__ import annotations

import functools
import time

from pipemoe.plan.cost.tuned import REFERENCE_LOOP_NS, REFERENCE_PRODUCT_NS

_ROUNDS, _PRODUCTS, _TURNS = 16, 10, 4000


@functools.cache
def slowness() -> int:
    """How much longer a core takes than the reference, in thousandths, once for a process: the median of some rounds of
    small products and of Python, as steps are made of both. Takes about 20 ms, counted in the thread's own time.
    """
    import torch

    rows, weight, out = torch.zeros(64, 128), torch.zeros(128, 256), torch.empty(64, 256)
    found = []
    with torch.inference_mode():
        for _ in range(_ROUNDS):
            begin = time.thread_time_ns()
            for _ in range(_PRODUCTS):
                torch.mm(rows, weight, out=out)
            middle = time.thread_time_ns()
            count = 0
            for number in range(_TURNS):
                count += number
            end = time.thread_time_ns()
            product, turn = (middle - begin) // _PRODUCTS, end - middle
            found.append(600 * product // REFERENCE_PRODUCT_NS + 400 * turn // REFERENCE_LOOP_NS)
    return sorted(found)[_ROUNDS // 2]
