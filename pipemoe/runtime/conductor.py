"""The conductor: one thread per rank that owns all issuing and all MPI. Callers hold futures.

Every wait has a deadline: it ends if there is no progress for `watchdog_seconds`, or if a peer dies. The error names
rank, operation and time, and is final. The futures get it, the peers are told, the communicators are aborted (in a
thread of their own, since abort may block), and the process ends after a grace period, whatever hangs.
"""

from __future__ import annotations

import atexit
import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any

from pipemoe.errors import FatalError, InputError, PipemoeError
from pipemoe.runtime.last_words import EXIT_CODE, OUTPUT_SECONDS, exit_now, say
from pipemoe.runtime.peers import Peers

if TYPE_CHECKING:
    from pipemoe.comm.side_channel import SideChannel
    from pipemoe.comm.transport import Transport

_PEER_CHECK_SECONDS = 0.01
_WATCH_SECONDS = 0.25
_IN_CALL_SECONDS = 3.0  # after so long in a library's call, a lost peer ends it
_LEFT_SECONDS = 2.0  # a peer that has closed its world may have done its part, which this rank has yet to see
_SHORTEST_PAUSE, _LONGEST_PAUSE = 20e-6, 500e-6  # seconds between polls
# MPI moves a collective on only when it is polled, stage by stage at each rank in turn; poll this fast only for the
# first 50 ms without news.
_LONGEST_PAUSE_OF_MPI, _OFTEN_SECONDS = 50e-6, 0.05


class PolledWake:
    """Wakes up the conductor's thread while it rests between polls."""

    longest_rest = 0.0  # as long as the poller likes

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def look(self) -> None:
        """Begin a look around; a `set` from now on ends the next rest."""

    def rest(self, seconds: float) -> None:
        if self._event.wait(seconds):
            self._event.clear()


class Conductor:
    """Runs the tasks handed to it one after another on its own thread."""

    def __init__(
        self,
        rank: int,
        *,
        watchdog_seconds: float,
        grace_seconds: float,
        moves_transfers: bool = False,
        set_up_thread: Callable[[], None] = lambda: None,
    ) -> None:
        """moves_transfers: polling moves the steps' collectives along, as MPI needs. set_up_thread: runs first on the
        conductor's thread.
        """
        self.rank = rank
        self.watchdog_seconds, self.grace_seconds = watchdog_seconds, grace_seconds
        self._peers = Peers(rank)
        self.wake: Any = PolledWake()  # other threads set it when they have news for the conductor's
        self.on_failure: list[Callable[[], None]] = []  # aborts of communicators
        self.health: list[Callable[[], None]] = []  # raise what libraries noticed by themselves
        self._moves_transfers = moves_transfers
        self.failure: FatalError | None = None
        self._closed = False
        self._unusable: PipemoeError = InputError(f"rank {rank}: the world is closed")
        self.step = 0
        self.step_seconds = 0.0  # see ask_patience
        self.ops_done = 0
        self.rounds: list[int] = []  # of an engine: its number, and for each slot the highest round posted to
        self.doing: object = "idle"  # anything whose str() names it
        self._alive: float | None = None  # when the thread last looked around; None while idle
        self._patience = watchdog_seconds  # how long it may be in one call
        self._tasks: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None] = queue.SimpleQueue()
        self._open: set[Future] = set()
        self._told = threading.Event()  # the peers have been told why this rank ends
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, args=(set_up_thread,), name="pipemoe conductor", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit)

    @property
    def side_channel(self) -> SideChannel | None:
        """The channel to the peers, once there is one."""
        return self._peers.channel

    def hear_peers_by(self, channel: SideChannel | None) -> None:
        """Watch the peers by this channel, and tell them by it when this rank fails."""
        self._peers.hear_by(channel)

    def listen_by(self, wake: Any) -> None:
        """From now on rest by `wake`, which hears what this thread may wait for, and says whether it must poll."""
        self.wake = wake

    def watch_transport(self, transport: Transport) -> None:
        """Raise what the transport notices by itself, and abort it when this rank fails."""
        self.on_failure.append(transport.abort)
        self.health.append(transport.check)

    def blame_peers_for(self, *errors: type[BaseException]) -> None:
        """A lost peer may be behind an error of these classes, a library's own; then the peer is named."""
        self._peers.blame_for(*errors)

    def submit(self, task: Callable[[], Any], future: Future | None = None) -> Future:
        """Run `task` on the conductor's thread. The future gets its result, unless the task resolves it earlier."""
        future = future or Future()
        with self._lock:
            if self.failure is not None or self._closed:
                future.set_exception(self.failure or self._unusable)
                return future
            self._open.add(future)
        self._tasks.put((task, future))
        return future

    def answer_for(self, future: Future) -> None:
        """When this rank fails, fail this future too, until `is_answered`. Raises what keeps it from working."""
        with self._lock:
            if self.failure is not None or self._closed:
                raise self.failure or self._unusable
            self._open.add(future)

    def is_answered(self, future: Future) -> None:
        """The future has its result."""
        with self._lock:
            self._open.discard(future)

    def call(self, task: Callable[[], Any]) -> Any:
        """Run `task` on the conductor's thread and wait for what it returns."""
        return self.submit(task).result()

    def progress(self) -> dict:
        """What the peers are told about this rank."""
        told = {"step": self.step, "ops": self.ops_done, "doing": str(self.doing), "patience": self.step_seconds}
        return told | {"rounds": self.rounds} if self.rounds else told

    def tell_rounds(self, rounds: list[int], at_once: bool = False) -> None:
        """Tell the peers to which rounds this rank has posted, with every heartbeat, perhaps also at once; [] for no
        more.
        """
        self.rounds = rounds
        if self.side_channel is not None and at_once:
            self.side_channel.tell_progress()

    def highest_round(self, engine: int, slot: int) -> int:
        """The highest round of a slot to which a peer has posted."""
        return 0 if self.side_channel is None else self.side_channel.highest_round(engine, slot)

    def note(self, doing: object, seconds: float | None = None) -> None:
        """Record what the conductor is about to do, for errors, and as a sign of life. It may take `seconds` (default:
        watchdog_seconds).
        """
        self.doing, self._patience = doing, seconds or self.watchdog_seconds
        self._alive = time.monotonic()

    def now_doing(self, what: object) -> None:
        """Name what errors and peers will name, without a sign of life. Its str() is taken only when it is needed."""
        self.doing = what

    def begin_step(self) -> None:
        """Count a step. Errors and peers name it."""
        self.step += 1

    def ask_patience(self, seconds: float) -> None:
        """Ask peers that wait for this rank to wait for so long without progress. 0: there is no step any more."""
        self.step_seconds = seconds

    def count_op(self) -> None:
        """One operation of the step has completed: progress, for the watchdog here and at the peers."""
        self.ops_done += 1

    def wait(
        self,
        ready: Callable[[], bool],
        doing: str,
        *,
        seconds: float | None = None,
        needs_all: bool = False,
        rests: bool = True,
    ) -> None:
        """Poll `ready` until it is true, at most `seconds` (watchdog_seconds) without progress.

        needs_all: every peer must take part, in a collective of MPI, so one that has closed its world is an error.
        rests: False where `ready` itself waits, for a bounded time.
        Between polls the thread rests: the longer nothing happened the longer, so that ranks that share a core leave it
        to those that compute, and until `wake`.
        """
        limit = seconds or self.watchdog_seconds
        self.note(doing, limit)
        seen, since, checked, pause = self.ops_done, time.monotonic(), 0.0, _SHORTEST_PAUSE
        patience = _LEFT_SECONDS if needs_all else math.inf
        often = _OFTEN_SECONDS if needs_all or self._moves_transfers else 0.0
        while True:
            self.wake.look()
            if ready():
                return
            now = self._alive = time.monotonic()
            if now - checked > _PEER_CHECK_SECONDS:
                self._check_peers(now - since, needs_all=now - since > patience)
                checked = now
            if self.ops_done != seen:
                seen, since, pause = self.ops_done, now, _SHORTEST_PAUSE
            elif now - since > limit and now - since > self._peers.patience():
                raise self._peers.timeout(self.doing, f"no progress for {now - since:.1f} s")
            if rests:
                self.wake.rest(self.wake.longest_rest or pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE_OF_MPI if now - since < often else _LONGEST_PAUSE)

    def roll(self, advance: Callable[[], float | None], late: Callable[[], tuple[str, float] | None]) -> None:
        """Call `advance` for as long as it likes. It never waits, and returns how many seconds this thread may rest
        before it calls again, unless it is woken up: 0 if there may be more to do, None at the end.

        late: what has made no progress for longest, and for how many seconds; None if nothing is under way, which may
        last for ever.
        """
        self.note(self.doing)
        checked, left, pause = 0.0, math.inf, _SHORTEST_PAUSE
        while True:
            self.wake.look()
            most = advance()
            now = self._alive = time.monotonic()
            if most is None:
                return
            if now - checked > _PEER_CHECK_SECONDS:
                if left == math.inf and self._peers.some_left():
                    left = now
                self._check_peers(0.0, needs_all=now - left > _LEFT_SECONDS)
                stands = late()
                if stands is not None and stands[1] > max(self.watchdog_seconds, self._peers.patience()):
                    self.doing = stands[0]
                    raise self._peers.timeout(self.doing, f"no progress for {stands[1]:.1f} s")
                checked = now
            if most:
                self.wake.rest(min(most, self.wake.longest_rest or pause))
                pause = min(1.5 * pause, most)
            else:
                pause = _SHORTEST_PAUSE

    def _check_peers(self, waited: float, needs_all: bool) -> None:
        """Raise if a peer is lost, or, with `needs_all`, has closed its world. waited: seconds without progress so
        far.
        """
        if self.failure is not None:
            raise self.failure
        for check in self.health:
            check()
        self._peers.check(self.doing, waited, needs_all)

    def watch(self) -> None:
        """Notice that its thread is stuck in a call, perhaps for a lost peer. Other threads call this now and
        then.
        """
        alive = self._alive
        if alive is None or self.failure is not None:
            return
        seconds = time.monotonic() - alive
        error: FatalError | None = None
        if seconds > _IN_CALL_SECONDS:
            error = self._peers.lost(self.doing, f"in one call for {seconds:.1f} s")
        if error is None and seconds > self._patience + 1.0:
            error = self._peers.timeout(self.doing, f"stuck for {seconds:.1f} s")
        if error is not None:
            self.fail(error)

    def fail(self, error: FatalError) -> None:
        """Give up for good; see the module's text."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure = error
            waiting, self._open = list(self._open), set()
        threading.Thread(target=self._end_process, name="pipemoe end", daemon=True).start()
        if self.side_channel is not None:
            self.side_channel.announce_failure(str(error), error.culprit)
        self._told.set()
        for abort in self.on_failure:
            threading.Thread(target=abort, name="pipemoe abort", daemon=True).start()
        say(f"pipemoe: {type(error).__name__}: {error}")
        for future in waiting:
            settle(future, error=error)

    def _end_process(self) -> None:
        time.sleep(self.grace_seconds)
        self._told.wait(OUTPUT_SECONDS)
        exit_now()

    def _at_exit(self) -> None:
        if self.failure is not None:
            self._told.wait(OUTPUT_SECONDS)
            say(f"pipemoe: rank {self.rank} ends with exit status {EXIT_CODE}: {self.failure}")
            exit_now()  # MPI's and NCCL's own clean-up would wait for the peers

    def close(self, last: Callable[[], None] = lambda: None, *, because: str = "") -> None:
        """Finish the submitted tasks, say good-bye, run `last`, and end the thread. `last` may take watchdog_seconds.

        `last` runs once the peers have said good-bye too, since their last operations may still be under way; it does
        not wait long for them. because: what went wrong here, for the peers. Then this returns at once, so that the
        caller can report it first; `join` waits.
        """
        with self._lock:
            self._closed = True

        def leave() -> None:
            self.note("leaving the other ranks", self.watchdog_seconds + _LEFT_SECONDS)
            if self.side_channel is not None:
                self.side_channel.say_good_bye(because)
                deadline = time.monotonic() + _LEFT_SECONDS
                while not self.side_channel.all_have_left() and time.monotonic() < deadline:
                    time.sleep(_LONGEST_PAUSE)
            last()

        self._tasks.put((leave, Future()))
        self._tasks.put(None)
        if not because:
            self.join()

    def join(self) -> None:
        """Wait for the end of the thread, once `close` has been called."""
        while self._thread.is_alive() and self.failure is None:
            self._thread.join(_WATCH_SECONDS)
            self.watch()
        if self.failure is None:
            atexit.unregister(self._at_exit)

    def disown(self, error: PipemoeError) -> None:
        """In a forked process, which has no conductor thread: every call raises `error`, and nothing waits."""
        self._lock = threading.Lock()  # somebody may have held it
        self._closed, self._unusable = True, error
        atexit.unregister(self._at_exit)
        for future in self._open:
            settle(future, error=error)

    def _run(self, set_up_thread: Callable[[], None]) -> None:
        broken: BaseException | None = None
        try:
            set_up_thread()
        except BaseException as error:  # noqa: BLE001  (what is handed in gets it)
            broken = error
        while (item := self._tasks.get()) is not None:
            task, future = item
            try:
                if broken is not None:
                    raise broken
                settle(future, task())
            except FatalError as error:
                self.fail(self._peers.named(self.doing, error))
            except PipemoeError as error:
                settle(future, error=error)
            except BaseException as error:  # noqa: BLE001  (anything else that gets this far is a broken rank)
                self.fail(self._peers.named(self.doing, error))
            finally:
                self._alive = None
                self.doing = "idle"
                with self._lock:
                    self._open.discard(future)
            del item, task, future


def settle(future: Future, result: Any = None, error: BaseException | None = None) -> None:
    """Resolve a future, unless it is resolved already."""
    try:
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
    except InvalidStateError:
        pass
