"""How the planner's core is compiled: see pipemoe.compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipemoe.compiled import Compiled


def compiled(function: Callable | None = None, *, seconds: int = 0) -> Any:
    """For functions that Python calls; compiled code may call them too. seconds: how long compiling takes."""
    if function is None:
        return lambda function: compiled(function, seconds=seconds)
    return Compiled(function, what="the planner", seconds=seconds, error_model="numpy")


def compiled_part(function: Callable) -> Compiled:
    """For functions that compiled code calls. If Python calls one, it runs as plain Python."""
    return Compiled(function, inside=True, error_model="numpy")


def compiled_look(function: Callable) -> Compiled:
    """For parts that make no arrays: compiled without counting references to arrays."""
    return Compiled(function, inside=True, error_model="numpy", _nrt=False)


def compiled_rule(function: Callable) -> Compiled:
    """The same for small ones, which are inlined."""
    return Compiled(function, inside=True, error_model="numpy", _nrt=False, forceinline=True)
