"""Functions that numba compiles at their first call: importing them compiles nothing, and does not even import numba.

What was compiled is kept on disk where that is possible (kept_code). If compiling takes longer than a user would wait
in silence, it says so (notices).
"""

from __future__ import annotations

import functools
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipemoe.notices import tell

PATIENCE_SECONDS = 2.0


class Compiled:
    """`function` as machine code, from its first call on; compiled code may call it as well.

    signatures: makes all numba signatures that it is compiled for, at its first call. Without them it is compiled for
    the types that it is called with. what, seconds: the words for a user if compiling takes long, and how long it takes
    on an idle core. inside: only compiled code calls the machine code, which is kept as part of its callers' code;
    Python calls the plain function. options: numba's.
    """

    def __init__(
        self,
        function: Callable,
        *,
        signatures: Callable[[], list] | None = None,
        what: str = "",
        seconds: int = 0,
        inside: bool = False,
        **options: Any,
    ) -> None:
        functools.update_wrapper(self, function)
        self._function, self._make_signatures, self._inside, self._options = function, signatures, inside, options
        self._what, self._seconds, self._lock = what or function.__name__, seconds, threading.Lock()
        self._call: Callable = function if inside else self._first_call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    @functools.cached_property
    def dispatcher(self) -> Any:
        """numba's own object."""
        from numba import njit

        if self._inside:  # the wrappers for Python take a seventh of the compile time
            return njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **self._options)(self._function)
        dispatcher = njit(**self._options)(self._function)
        from pipemoe.kept_code import KeptCode, tell_nothing_is_kept

        try:
            dispatcher._cache = KeptCode(self._function, self._options)
        except (RuntimeError, OSError) as error:
            tell_nothing_is_kept(str(error))
        return dispatcher

    @property
    def _numba_type_(self) -> Any:
        """numba looks here when compiled code calls this."""
        return self.dispatcher._numba_type_

    @property
    def is_kept(self) -> bool:
        """Will other processes on this machine find this process's machine code on disk?"""
        return getattr(self.dispatcher._cache, "is_kept", False)

    @functools.cached_property
    def address(self) -> int:
        """Of the machine code as C calls it, for the one signature that there is. Compiles it, unless this is done."""
        self.compile()
        (found,) = self.dispatcher.overloads.values()
        return found.library.get_pointer_to_function(found.fndesc.llvm_cfunc_wrapper_name)

    def compile(self) -> None:
        """Compile for all `signatures` now, unless this is done."""
        if self._make_signatures is None or self._call != self._first_call:
            return
        with self._lock, _compiling(self._what, self._seconds, self.is_kept):
            if self._call == self._first_call:
                for signature in self._make_signatures():
                    self.dispatcher.compile(signature)
                self.dispatcher.disable_compile()
                self._call = self.dispatcher

    def _first_call(self, *arguments: Any) -> Any:
        self.compile()
        with _compiling(self._what, self._seconds, self.is_kept):
            result = self.dispatcher(*arguments)
        self._call = self.dispatcher
        return result


@contextmanager
def _compiling(what: str, seconds: int, kept: bool) -> Iterator[None]:
    """No garbage collection while compiling. If it takes longer than a moment, say so, and say when it is done."""
    expected = f", which takes about {seconds} s on an idle core" if seconds else ""
    later = "later starts find it on disk" if kept else "every start does so, as it cannot be kept on disk"
    told, collects = threading.Event(), gc.isenabled()

    def say() -> None:
        if tell(f"compiling {what}{expected}; {later}", once=f"compiling {what}"):
            told.set()

    begun, timer = time.perf_counter(), threading.Timer(PATIENCE_SECONDS, say)
    timer.daemon = True
    timer.start()
    # a compiler makes millions of objects; the garbage collector would take an eighth of its time
    gc.disable()
    try:
        yield
    finally:
        timer.cancel()
        if collects:
            gc.enable()
    if told.is_set():
        tell(f"compiled {what} in {time.perf_counter() - begun:.0f} s")
