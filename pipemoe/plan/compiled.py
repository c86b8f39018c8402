"""How the planner's core is compiled: see pipemoe.compiled. Ranks with code of different sources would plan
differently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipemoe.compiled import Compiled


def compiled(function: Callable | None = None, *, seconds: int = 0) -> Any:
    """What Python calls, and other compiled code may. seconds: that compiling takes."""
    if function is None:
        return lambda function: compiled(function, seconds=seconds)
    return Compiled(function, what="the planner", seconds=seconds, error_model="numpy")


def compiled_part(function: Callable) -> Compiled:
    """What only other compiled functions call, or Python seldom: there it is not compiled."""
    return Compiled(function, inside=True, error_model="numpy")


def compiled_look(function: Callable) -> Compiled:
    """For parts that make no arrays, only look at them: without counting references to them."""
    return Compiled(function, inside=True, error_model="numpy", _nrt=False)


def compiled_rule(function: Callable) -> Compiled:
    """The same for small ones: counting would take most of the time."""
    return Compiled(function, inside=True, error_model="numpy", _nrt=False, forceinline=True)
