"""Where each thread of a rank is when its watchdog ends it, for a test that fails."""

from __future__ import annotations

import faulthandler
import sys

from pipemoe import World
from pipemoe.errors import WatchdogTimeout


def tell_stacks_of_timeouts(world: World) -> None:
    """From now on, on standard error."""

    def tell() -> None:
        if isinstance(world.conductor.failure, WatchdogTimeout):
            faulthandler.dump_traceback(sys.stderr.fileno())

    world.conductor.on_failure.append(tell)
