"""The arguments of `pipemoe.init`, checked before anything starts. Whatever cannot work is a ConfigError."""

from __future__ import annotations

import math
import numbers
import os
import reprlib
from dataclasses import dataclass
from typing import Any

from pipemoe.errors import ConfigError

_DEVICES = ("auto", "cpu", "cuda")
MOST_SLOTS = 64  # each has a pair of communicators; MPICH can make 2,048 in a process, and has others to make
_MOST_SECONDS = 366 * 24 * 3600.0  # more is no limit, and the system's timers would refuse it


@dataclass(frozen=True, slots=True)
class InitArguments:
    """The checked arguments of `init`.

    A rank with bad arguments takes these defaults until all ranks have heard of its error.
    """

    device: str = "cpu"
    num_slots: int = 1
    watchdog_seconds: float = 60.0
    setup_seconds: float = 600.0
    grace_seconds: float = 5.0


def init_arguments(
    device: Any, num_slots: Any, watchdog_seconds: Any, setup_seconds: Any, grace_seconds: Any
) -> InitArguments:
    """The arguments, checked. num_slots: None takes PIPEMOE_NUM_SLOTS, or else 4.

    Raises ConfigError, which names the argument, its value and the values allowed.
    """
    if not isinstance(device, str) or device not in _DEVICES:  # an array would be compared element by element
        raise ConfigError(f"device is {_shown(device)}; it must be 'auto', 'cpu' or 'cuda'")
    return InitArguments(
        str(device),
        _slots_of_environment() if num_slots is None else _slots(num_slots),
        _seconds("watchdog_seconds", watchdog_seconds),
        _seconds("setup_seconds", setup_seconds),
        _seconds("grace_seconds", grace_seconds, may_be_zero=True),
    )


def _slots(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 1 <= int(value) <= MOST_SLOTS:
        raise ConfigError(f"num_slots is {_shown(value)}; it must be a whole number from 1 to {MOST_SLOTS}")
    return int(value)


def _slots_of_environment() -> int:
    text = os.environ.get("PIPEMOE_NUM_SLOTS", "4")
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MOST_SLOTS):
        raise ConfigError(f"PIPEMOE_NUM_SLOTS is {_shown(text)}; it must be a whole number from 1 to {MOST_SLOTS}")
    return int(text)


def _seconds(name: str, value: Any, *, may_be_zero: bool = False) -> float:
    good = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < 0 or (value == 0 and not may_be_zero) or value > _MOST_SECONDS:
        least = "at least 0" if may_be_zero else "more than 0"
        raise ConfigError(
            f"{name} is {_shown(value)}; it must be a number of seconds, {least} and at most {_MOST_SECONDS:.0f} (a "
            "year)"
        )
    return float(value)


def _shown(value: Any) -> str:
    """The value in a line of an error; its own words may be long, or fail."""
    try:
        return " ".join(reprlib.repr(value).split())
    except Exception:  # noqa: BLE001  (a caller's class)
        return f"a {type(value).__name__}"
