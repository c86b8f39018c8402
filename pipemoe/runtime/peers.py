"""The other ranks as a conductor sees them: who is lost, who has left, and whom an error is put down to."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pipemoe.errors import FatalError, PeerLost, WatchdogTimeout, words

if TYPE_CHECKING:
    from pipemoe.comm.side_channel import SideChannel

# MPI or NCCL may report a lost peer first; this long the side channel has to name it.
_NAMED_SECONDS = 0.5
_POLL_SECONDS = 0.01


class Peers:
    """Errors name what this rank was doing, `doing`: anything whose str() says so, taken only when it is needed."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.channel: SideChannel | None = None  # None: there are no peers, or they cannot be heard yet
        self._library_errors: tuple[type[BaseException], ...] = ()  # of MPI and NCCL

    def hear_by(self, channel: SideChannel | None) -> None:
        self.channel = channel

    def blame_for(self, *errors: type[BaseException]) -> None:
        """A lost peer may be behind an error of these classes, a library's own; then the peer is named."""
        self._library_errors += errors

    def patience(self) -> float:
        """For how many seconds without progress the peers ask to be waited for."""
        return 0.0 if self.channel is None else self.channel.patience()

    def some_left(self) -> bool:
        """Has a peer closed its world?"""
        return self.channel is not None and any(peer.left for peer in self.channel.peers.values())

    def check(self, doing: object, waited: float, needs_all: bool) -> None:
        """Raise if a peer is lost, or, with `needs_all`, has closed its world. waited: seconds without progress so
        far.
        """
        if self.channel is None:
            return
        lost = self.lost(doing, f"after {waited:.1f} s of waiting")
        if lost is not None:
            raise lost
        broken = self.channel.error
        if broken is not None:
            raise FatalError(
                f"rank {self.rank}: {type(broken).__name__} on the side channel's thread: {broken}"
            ) from broken
        if needs_all:
            left = self._left(doing, f"waited {waited:.1f} s")
            if left is not None:
                raise left

    def lost(self, doing: object, when: str) -> PeerLost | None:
        """The error that names the lost peer, if a peer is lost."""
        lost = None if self.channel is None else self.channel.failed()
        if lost is None:
            return None
        return PeerLost(f"rank {self.rank}: lost rank {lost[0]} ({lost[1]}) during {doing}, {when}", culprit=lost[0])

    def _left(self, doing: object, when: str) -> PeerLost | None:
        """The error of a peer that has closed its world, if there is one."""
        for rank, peer in () if self.channel is None else self.channel.peers.items():
            if peer.left:
                why = f" ({peer.reason})" if peer.reason else ""
                text = f"rank {self.rank}: rank {rank} has closed its world{why}, but {doing} needs every rank; {when}"
                return PeerLost(text, culprit=rank)
        return None

    def timeout(self, doing: object, what: str) -> WatchdogTimeout:
        """The error of a wait that took too long: `what` says how long. A silent peer is to blame, if there is one."""
        if self.channel is None or not self.channel.peers:
            return WatchdogTimeout(f"rank {self.rank}: {what} in {doing}")
        text = f"rank {self.rank}: {what} in {doing}; peers: {self.channel.describe()}"
        silent = self.channel.silent()
        if silent is None:
            return WatchdogTimeout(text)
        text += (
            f"; rank {silent[0]} says nothing, heard {silent[1]:.1f} s ago: "
            "it has stopped, or its host cannot be reached"
        )
        return WatchdogTimeout(text, culprit=silent[0])

    def named(self, doing: object, error: BaseException) -> FatalError:
        """The error to report for any error that ends the ranks' work. MPI and NCCL may notice a lost peer first, but
        cannot name it.
        """
        if isinstance(error, self._library_errors):
            begin, when = time.monotonic(), f"where the library says: {words(error)}"
            while (
                (lost := self.lost(doing, when)) is None
                and self.channel is not None
                and time.monotonic() - begin < _NAMED_SECONDS
            ):
                time.sleep(_POLL_SECONDS)
            lost = lost or self._left(doing, when)
            if lost is not None:
                lost.__cause__ = error
                return lost
        elif isinstance(error, FatalError):
            return error
        fatal = FatalError(f"rank {self.rank}: {type(error).__name__} in {doing}: {words(error)}")
        fatal.__cause__ = error
        return fatal
