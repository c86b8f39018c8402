"""A case of the fuzz: one call of the public API on every rank, some of them with a mutated argument.

Every rank draws the same case from the same seed, the arguments of all ranks included, and makes its own rank's call.
So each knows what the ranks together must come to, and nothing has to be exchanged beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

RIGHT, WRONG, ODD = (
    "right",
    "wrong",
    "odd",
)  # must work; must be an error; may be either, but if it works the result is right


class Planted(Exception):
    """What the caller's own code raises."""


class Argument(NamedTuple):
    """What one rank's caller passes."""

    name: str  # for reports: never the repr of what may have a hostile one
    value: Any
    meaning: str = RIGHT
    same: Any = None  # where all ranks must pass the same: right ones that differ here are an error


@dataclass
class Case:
    """One call on every rank, and what must become of it."""

    api: str
    arguments: list[Argument]  # per rank
    call: Callable[[], Any]  # this rank's
    judge: Callable[[Any], str | None]  # what is wrong with what the call gave, or None
    wanted: str = ODD  # of the ranks together
    is_local: bool = False  # no other rank hears of it
    may_defer: bool = False  # a rank's own error in the midst of a step: the others hear of it at the next step
    own_errors: tuple[type[BaseException], ...] = ()  # of the caller, which come back to it as they are
    makes: bool = False  # a model or a PipelinedMoE: another can be made afterwards
    around: str = ""  # what global state the call is made in

    @property
    def text(self) -> str:
        names = [a.name for a in self.arguments]
        said = names[0] if len(set(names)) == 1 else ", ".join(f"rank {r}: {name}" for r, name in enumerate(names))
        return f"{self.api}: {said}" + (f", inside {self.around}" if self.around else "")


def any_result(_: Any) -> None:
    """No result is wrong."""


class Draw:
    """The random choices of one case, for a rank among `size`."""

    def __init__(self, seed: int, number: int, rank: int, size: int) -> None:
        self.random = Random(f"{seed}/{number}")
        self.rank, self.size = rank, size

    def per_rank(self, mutated: Callable[[Random], Argument], right: Callable[[Random], Argument]) -> list[Argument]:
        """Arguments for each rank: one rank's mutated, all ranks' alike, or each rank's in a way of its own."""
        who = self.random.choice(("one", "all", "each"))
        culprit, seeds = self.random.randrange(self.size), [self.random.random() for _ in range(self.size)]
        arguments = []
        for rank in range(self.size):
            random = Random(seeds[0 if who == "all" else rank])
            arguments.append(mutated(random) if who != "one" or rank == culprit else right(random))
        return arguments


def wanted_of(arguments: list[Argument]) -> str:
    """What the ranks together must come to."""
    meanings = [a.meaning for a in arguments]
    if WRONG in meanings:
        return WRONG
    if ODD in meanings:
        return ODD
    return RIGHT if all(a.same == arguments[0].same for a in arguments) else WRONG
