"""Experts that take waves as they arrive: whether this machine has them, and how fast they are then."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipemoe.config import Config
from pipemoe.errors import ConfigError
from pipemoe.plan.arrivals import INDEX_SMS

if TYPE_CHECKING:
    from pipemoe.plan.room import Room
    from pipemoe.world.world import World

# Speed relative to calls on whole waves, where both gather their rows in tiles of 128. Measured: .52 to .65 (one H100,
# kernels/NOTES.md, version A1).
GATHERING_PERMILLE = 600


def arrivals_permille(world: World, experts: Any, config: Config) -> tuple[int, str | None]:
    """The experts' speed while they wait for rows, per mille of their full speed: that of the slowest rank.

    0, and why, if some rank has no such experts. The same on all ranks; every rank calls.
    """
    refused = refusal(world, experts, config)
    speed = 0 if refused else speed_permille(world, experts)
    gathered = [
        json.loads(p)
        for p in world.all_gather(
            json.dumps([refused, speed]).encode(), "asking for experts that take waves as they arrive"
        )
    ]
    first = next((f"rank {rank}: {reason}" for rank, (reason, _) in enumerate(gathered) if reason), None)
    return (0 if first else min(speed for _, speed in gathered)), first


def refusal(world: World, experts: Any, config: Config) -> str | None:
    """Why this rank's experts cannot take waves as they arrive, or None."""
    if experts is None:
        return "no arrivals: no experts"
    if not experts.supports_arrivals:
        return f"no arrivals: {experts.implementation} experts take whole waves only"
    from pipemoe.experts.arrivals import too_many_rows

    room = arrival_room(world, experts)
    try:
        if room is not None:
            room.check_arrivals()
    except ConfigError as error:
        return str(error)
    return too_many_rows(experts, config.max_wave_rows(world.size))


def arrival_room(world: World, experts: Any) -> Room | None:
    """The room for this rank's collectives beside experts that wait for rows; None if there are no collectives."""
    return None if world.block_room is None else replace(world.block_room, arrival_blocks=_num_blocks(world, experts))


def speed_permille(world: World, experts: Any) -> int:
    """The speed of these experts on waves that arrive, on fewer multiprocessors, per mille of their full speed."""
    return max(1, GATHERING_PERMILLE * _num_blocks(world, experts) // experts.num_sms)


def arriving_experts(world: World, experts: Any) -> Any:
    """The same experts for waves whose rows arrive in parts (pipemoe.experts.arrivals)."""
    from pipemoe.experts.arrivals import ArrivingExperts

    return ArrivingExperts(experts.with_free_sms(_kept(world)))


def _kept(world: World) -> int:
    return world.block_room.kept_from_arrivals if world.block_room is not None else 0


def _num_blocks(world: World, experts: Any) -> int:
    return max(1, experts.with_free_sms(_kept(world)).num_sms - INDEX_SMS)
