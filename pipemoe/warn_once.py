"""Warnings that a world gives once, at the caller's line that caused them."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipemoe.world.world import World


def warn_once(world: World, text: str, *, about: str = "", aloud: bool = True) -> None:
    """Warn once in this world, at the line that called the library. Of warnings `about` the same, only the first is
    given. Without `aloud` nothing is shown, but a filter that turns warnings into errors still raises, as on other
    ranks.
    """
    if not world.is_first(about or text):
        return
    library, frame, depth = str(Path(__file__).resolve().parent) + os.sep, sys._getframe(1), 2
    while frame.f_back is not None and os.path.realpath(frame.f_code.co_filename).startswith(library):
        frame, depth = frame.f_back, depth + 1
    with nullcontext() if aloud else warnings.catch_warnings(record=True):
        warnings.warn(text, stacklevel=depth)
