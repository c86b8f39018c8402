"""The one error hierarchy of pipemoe."""

from __future__ import annotations

import traceback


class PipemoeError(RuntimeError):
    """Base of every error that pipemoe raises on purpose. `is_shared`: every rank raises it, with the same words."""

    is_shared = False


class ConfigError(PipemoeError, ValueError):
    """A setting that cannot work; the message names the field, its value and what it may be."""


class InputError(PipemoeError, ValueError):
    """A tensor or count given by the caller is wrong: shape, dtype, device or value."""


class QueueFull(PipemoeError):
    """An engine's queue on this rank holds as many requests as it may; submit again later."""


class CheckpointError(PipemoeError):
    """A checkpoint is missing, truncated, or not of a known family."""


class MismatchError(PipemoeError):
    """Ranks disagree about something that every rank must share; raised on every rank."""


class PlanError(PipemoeError):
    """A plan breaks a property that `verify` proves; the message names the property."""


class ModelError(PipemoeError):
    """Model code of some rank raised; every rank hears of it at the next exchange."""


class FatalError(PipemoeError):
    """The ranks can no longer work together; the process ends after this one.

    culprit: the rank behind it, if that is known and is not the one that raises.
    """

    def __init__(self, *args: object, culprit: int | None = None) -> None:
        super().__init__(*args)
        self.culprit = culprit


class WatchdogTimeout(FatalError):
    """An operation made no progress for longer than the watchdog allows."""


class PeerLost(FatalError):
    """Another rank died, cannot be reached, or said that it is ending."""


_MOST_WORDS = 4000  # characters of somebody else's message that travel in ours


def words(error: BaseException) -> str:
    """What an exception says, whatever its own `__str__` does, and however long that is."""
    try:
        text = str(error)
    except BaseException as second:  # noqa: BLE001
        return f"(its own words cannot be had: __str__ raises {type(second).__name__})"
    return text if len(text) <= _MOST_WORDS else f"{text[:_MOST_WORDS]} ... ({len(text)} characters)"


def describe(error: BaseException) -> str:
    """An exception's type and words."""
    name, text = type(error).__name__, words(error)
    return f"{name}: {text}" if text else name


def forget_locals(error: BaseException) -> None:
    """Let go of what an error's frames hold, and those of its causes: memory, perhaps, whose lack it tells."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        traceback.clear_frames(found.__traceback__)
        waiting += [found.__cause__, found.__context__]
