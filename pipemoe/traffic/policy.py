"""How requests reach ranks, and how ranks take them into rounds: the policies that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipemoe.errors import InputError

ROUTINGS = ("round_robin", "least_tokens")
# As pipemoe.Engine names them. All but the first are lockstep: one slot, and all ranks step together.
POLICIES = ("rolling", "lockstep", "lockstep_delayed", "lockstep_balanced")


class Policy(NamedTuple):
    """One way to serve."""

    name: str  # of POLICIES
    step_tokens: int | None = None  # of a lockstep policy: most tokens per rank and step
    routing: str = "round_robin"

    @property
    def is_lockstep(self) -> bool:
        return self.name != "rolling"

    @property
    def label(self) -> str:
        """As tables and pictures show it."""
        of_steps = "" if self.step_tokens is None else f" {self.step_tokens}"
        routed = " least tokens" if self.routing == "least_tokens" and self.name != "lockstep_balanced" else ""
        return self.name + of_steps + routed


def policies_of(names: Sequence[str], step_tokens: Sequence[int], routing: str) -> list[Policy]:
    """The policies by name; a lockstep policy once for each number of `step_tokens`. "lockstep_balanced" means that
    requests go to the rank with the least waiting tokens, whatever `routing` says. Raises InputError.
    """
    found = []
    for name in names:
        if name not in POLICIES:
            raise InputError(f"policy {name!r}: must be one of {', '.join(POLICIES)}")
        if name == "rolling":
            found.append(Policy(name, None, routing))
        else:
            routed = "least_tokens" if name == "lockstep_balanced" else routing
            found += [Policy(name, tokens, routed) for tokens in step_tokens]
    if len(set(found)) != len(found):
        raise InputError(
            f"policies {', '.join(names)}, {', '.join(map(str, step_tokens))} tokens a step: give each once"
        )
    return found


def rank_for(routing: str, number: int, waiting_tokens: Sequence[int]) -> int:
    """The rank that gets request `number`. waiting_tokens: per rank, of requests that have no first token yet."""
    if routing == "round_robin":
        return number % len(waiting_tokens)
    return min(range(len(waiting_tokens)), key=lambda rank: (waiting_tokens[rank], rank))
