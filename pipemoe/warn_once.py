"""Warnings that are given once in a world, with the line of the caller who gave cause."""

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
    """Once in this world, with the line that called the library; of warnings `about` the same, the first. Not aloud:
    only where a filter makes it an error, as on other ranks."""
    if not world.is_first(about or text):
        return
    library, frame, depth = str(Path(__file__).resolve().parent) + os.sep, sys._getframe(1), 2
    while frame.f_back is not None and os.path.realpath(frame.f_code.co_filename).startswith(library):
        frame, depth = frame.f_back, depth + 1
    with nullcontext() if aloud else warnings.catch_warnings(record=True):
        warnings.warn(text, stacklevel=depth)
