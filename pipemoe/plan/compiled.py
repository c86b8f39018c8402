"""How the planner's core is compiled: by numba, once per machine, kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import event


def _stamp() -> tuple[tuple[str, float, int], ...]:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return tuple((file.name, file.stat().st_mtime, file.stat().st_size) for file in files)


_STAMP = _stamp()


def compiled(function: Callable, **options: Any) -> Callable:
    """`function` as machine code. Numba takes kept code to be current as long as the function's own file is; but it holds what
    the function calls in other files too, and ranks with different mixtures would plan differently. So any change in this
    folder makes it compile again."""
    dispatcher = njit(cache=True, error_model="numpy", **options)(function)
    kept = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if hasattr(kept, "_source_stamp"):
        kept._source_stamp = _STAMP
    return dispatcher


def compiled_rule(function: Callable) -> Callable:
    """For small functions that make no arrays, only look at them: without counting references, which would take most of the time."""
    return compiled(function, _nrt=False, forceinline=True)


class _FirstCompilation(event.Listener):
    def __init__(self, say: Callable[[], None]) -> None:
        self._say, self._said = say, False

    def on_start(self, event: Any) -> None:
        if not self._said:
            self._said = True
            self._say()

    def on_end(self, event: Any) -> None:
        pass


@contextmanager
def on_first_compilation(say: Callable[[], None]) -> Iterator[None]:
    """Inside, `say` is called once, before the first function that is compiled; never where all of them are kept on disk."""
    with event.install_listener("numba:compile", _FirstCompilation(say)):
        yield
