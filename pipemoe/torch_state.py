"""Keeps the caller's settings of torch and numpy away from the library's work.

Some belong to a thread: grad and inference mode, autocast, the default device, numpy's error state. The conductor and
the lanes have threads of their own, where only grad mode must be set (`no_grad_on_this_thread`). Set-up work on the
caller's thread runs in `undisturbed`. A layer's call has no time for all of that, and runs in `plain_tensors`.

Others belong to the process: the default dtype, deterministic algorithms, the number of threads. The library must not
change these, so it names dtype and device wherever it makes a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Tensors made here are ordinary: other threads may write to them, and no gradients are recorded."""
    import torch

    with torch.inference_mode(False), torch.no_grad():  # in this order: leaving inference mode turns gradients on
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run as if the caller had changed none of this thread's settings."""
    import torch

    with plain_tensors(), torch.device("cpu"), np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"):
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield


def no_grad_on_this_thread() -> None:
    """Turn gradients off, on a thread of the library's own."""
    import torch

    torch.set_grad_enabled(False)
