"""The one error hierarchy of pipemoe."""

from __future__ import annotations


class PipemoeError(RuntimeError):
    """Base of every error that pipemoe raises on purpose. `is_shared`: every rank raises it, with the same words."""

    is_shared = False


class ConfigError(PipemoeError, ValueError):
    """A setting that cannot work; the message names the field, its value and what it may be."""


class InputError(PipemoeError, ValueError):
    """A tensor or count given by the caller is wrong: shape, dtype, device or value."""


class CheckpointError(PipemoeError):
    """A checkpoint is missing, truncated, or not of a known family."""


class MismatchError(PipemoeError):
    """Ranks disagree about something that every rank must share; raised on every rank."""


class PlanError(PipemoeError):
    """A plan breaks a property that `verify` proves; the message names the property."""


class ModelError(PipemoeError):
    """Model code of some rank raised; every rank hears of it at the next exchange."""


class FatalError(PipemoeError):
    """The ranks can no longer work together; the process ends after this one."""


class WatchdogTimeout(FatalError):
    """An operation made no progress for longer than the watchdog allows."""


class PeerLost(FatalError):
    """Another rank died, or said that it is ending."""
