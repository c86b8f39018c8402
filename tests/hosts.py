"""Ranks of one machine that take themselves for ranks of several hosts: memory is shared inside each of them only."""

from __future__ import annotations

import os

VARIABLE = "PIPEMOE_TEST_HOSTS"


def pretend_hosts(names: str) -> None:
    """From now on this rank's worlds see several hosts. names: a letter for the host of each rank, again from the start
    if there are more ranks.
    """
    from pipemoe.world import meet
    from pipemoe.world.launcher import rank_text

    words = rank_text(os.environ).split()
    rank = int(words[1]) if words[0] == "rank" else 0
    name = f"{os.uname().nodename} {names[rank % len(names)]}"
    meet._host = lambda: name


def pretend_hosts_if_told() -> None:
    """As the environment says."""
    if os.environ.get(VARIABLE):
        pretend_hosts(os.environ[VARIABLE])
