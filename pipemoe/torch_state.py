"""What torch and numpy do depends on states that belong to the caller: kept away from what the library does.

Of a thread: grad and inference mode, autocast, the default device, numpy's error state. The engine and the lanes have
threads of their own, so there these are as a process starts, but for grad mode (`no_grad_on_this_thread`); what runs on
the caller's thread at set-up stands in `undisturbed`, and a layer's call, which has no time for all of it, in
`plain_tensors`. Of the process: the default dtype, deterministic algorithms, threads. Nobody may change these under the
caller's feet, so every tensor is made with its dtype and device said.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Tensors made here are ordinary ones that other threads may write to, and no part of a graph of gradients."""
    import torch

    with torch.inference_mode(False), torch.no_grad():  # in this order: leaving inference mode turns gradients on
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """As if the caller had changed nothing of this thread's state."""
    import torch

    with plain_tensors(), torch.device("cpu"), np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"):
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield


def no_grad_on_this_thread() -> None:
    """For threads of the library's own."""
    import torch

    torch.set_grad_enabled(False)
