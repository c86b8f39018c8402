"""A forward of a transformers model that stops at each of its routed experts.

    lane       resume() .....................| x, ids, weights of layer 0 |  resume(y) ........| ... of layer 1 | ...
    its thread     embedding, attention, router                            | the layer's end, attention, router

So any decoder is cut at its experts, however its layers are built, and everything else is transformers' own code. The
forward runs in a thread of its own, which waits while others compute; only one of the two runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

_local = threading.local()
Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _Abandoned(BaseException):
    """Ends the thread of a forward that nobody will resume."""


def _taken_lock() -> threading.Lock:
    """To wait for by `acquire`, until another thread releases it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class _Baton:
    """What the two threads hand each other; neither holds the CutForward itself, so that dropping it is noticed."""

    def __init__(self) -> None:
        self.forward, self.caller = _taken_lock(), _taken_lock()
        self.given: Any = None  # to the forward: the experts' result
        self.stream: Any = None  # to the forward: where the caller enqueues
        self.routed: Routed | None = None  # to the caller
        self.result: Any = None
        self.error: BaseException | None = None
        self.is_over = self.is_abandoned = False

    def wait_for_caller(self) -> Any:
        self.caller.release()
        self.forward.acquire()
        if self.is_abandoned:
            raise _Abandoned
        if self.stream is not None:
            torch.cuda.set_stream(self.stream)
        return self.given


def stop_at_experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Called in the forward's thread in place of the experts: x [T, H], ids, weights [T, K]. Returns [T, H]."""
    baton = getattr(_local, "baton", None)
    if baton is None:
        raise RuntimeError("the experts of this model are on several ranks: call it by pipemoe's Model")
    baton.routed = (x, ids, weights)
    return baton.wait_for_caller()


class CutForward:
    """One forward, from its beginning to its result. Used by one thread at a time."""

    def __init__(self, call: Callable[[], Any], threads: Threads) -> None:
        self._baton = _Baton()
        threads.run(self._baton, call)

    def resume(self, y: torch.Tensor | None = None) -> Routed | None:
        """Go on to the next experts, and return their rows; None if there are none left. y: what the last ones give.

        Raises what the forward raises.
        """
        baton = self._baton
        baton.given, baton.routed = y, None
        baton.stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
        baton.forward.release()
        baton.caller.acquire()
        if baton.error is not None:
            raise baton.error
        return baton.routed

    @property
    def result(self) -> Any:
        """What the forward has returned."""
        return self._baton.result

    def __del__(self) -> None:
        baton = self._baton
        if not baton.is_over:
            baton.is_abandoned = True
            baton.forward.release()


class Threads:
    """Threads that forwards run in, used again and again: libraries keep a state for each."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []

    def run(self, baton: _Baton, call: Callable[[], Any]) -> None:
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = _Worker(self._idle)
        worker.take(baton, call)


class _Worker:
    def __init__(self, idle: list[_Worker]) -> None:
        self._idle = idle
        self._task: tuple[_Baton, Callable[[], Any]] | None = None
        self._begin = _taken_lock()
        threading.Thread(target=self._work, name="pipemoe forward", daemon=True).start()

    def take(self, baton: _Baton, call: Callable[[], Any]) -> None:
        self._task = baton, call
        self._begin.release()

    def _work(self) -> None:
        while True:
            self._begin.acquire()
            assert self._task is not None  # `take` has set it
            (baton, call), self._task = self._task, None
            _local.baton = baton
            try:
                baton.forward.acquire()
                if not baton.is_abandoned:
                    if baton.stream is not None:
                        torch.cuda.set_stream(baton.stream)
                    with torch.no_grad():
                        baton.result = call()
            except _Abandoned:
                pass
            except BaseException as error:
                baton.error = error
            baton.is_over = True
            baton.routed, baton.given = None, None
            self._idle.append(self)
            baton.caller.release()
            del baton, call
            _local.baton = None
