"""The world: a process's place among the ranks, from its start to its end."""

from pipemoe.world.world import World, init

__all__ = ["World", "init"]
