"""Settings of torch, numpy and Python that a caller may have made, and whether a call leaves them as they were."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


AROUND = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "default dtype bfloat16": lambda: _default_dtype(torch.bfloat16),
    "default dtype float64": lambda: _default_dtype(torch.float64),
    "default dtype float16": lambda: _default_dtype(torch.float16),
    "default device meta": lambda: torch.device("meta"),
    "default device cpu": lambda: torch.device("cpu"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic algorithms": _deterministic,
    "numpy errors raised": lambda: np.errstate(all="raise"),
    "warnings as errors": _warnings_are_errors,
    "forked random state": torch.random.fork_rng,
}


def state() -> dict[str, Any]:
    """What a call must leave as it is."""
    return {
        "torch's default dtype": str(torch.get_default_dtype()),
        "torch's default device": str(torch.get_default_device()),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "torch's number of threads": torch.get_num_threads(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "numpy's errors": str(np.geterr()),
        "torch's random state": hash(torch.get_rng_state().numpy().tobytes()),
        "numpy's random state": str(np.random.get_state()[1:3]),
    }
