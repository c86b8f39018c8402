"""init and close, with odd arguments and an odd environment."""

from __future__ import annotations

import os
from random import Random
from typing import Any

import pipemoe
from tests.fuzz.case import ODD, RIGHT, WRONG, Argument, Case, Draw
from tests.fuzz.odd import odd_number, odd_value
from tests.fuzz.stage import Stage

_ENVIRONMENT = {
    **dict.fromkeys(
        ("PIPEMOE_NUM_SLOTS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"),
        ("", " ", "x", "0", "-1", "1.5", "٣", "9" * 30, "1"),
    ),
    "WORLD_SIZE": ("2", "8", "x", "", "1"),
}
_RIGHT_ENVIRONMENT = ("1",)
RIGHT_INIT = {"watchdog_seconds": 10.0, "grace_seconds": 1.0, "num_slots": 1, "device": "cpu", "setup_seconds": 60.0}


def init(draw: Draw, stage: Stage) -> Case:
    """init(...) with odd arguments or an odd environment, the same on all ranks, then close()."""

    def mutated(random: Random) -> Argument:
        name = random.choice(sorted(RIGHT_INIT))
        what, value = odd_value(random) if name == "device" or random.random() < 0.5 else odd_number(random, 3)
        if draw.size == 1 and random.random() < 0.2:
            variable = random.choice(sorted(_ENVIRONMENT))
            text = random.choice(_ENVIRONMENT[variable])
            passed = {variable: text} | ({"num_slots": None} if variable == "PIPEMOE_NUM_SLOTS" else {})
            return Argument(f"{variable}={text!r:.20}", passed, RIGHT if text in _RIGHT_ENVIRONMENT else ODD)
        choices = {
            "nothing odd": ({}, RIGHT),
            "num_slots": ({"num_slots": random.choice((1, 2, 4))}, RIGHT),
            "num_slots of 2000": ({"num_slots": 2000}, ODD),
            "watchdog_seconds nan": ({"watchdog_seconds": float("nan")}, WRONG),
            "a negative time": ({random.choice(("watchdog_seconds", "setup_seconds", "grace_seconds")): -1}, WRONG),
            f"{name} is {what}": ({name: value}, ODD),
        }
        chosen = random.choice([*choices, *[f"{name} is {what}"] * 5])
        return Argument(chosen, *choices[chosen])

    # What one rank alone does wrong here, the others learn by the clock, and end.
    argument = mutated(draw.random)
    passed = argument.value

    def call() -> list[bytes]:
        return open_and_close(RIGHT_INIT | passed)

    def judge(found: list[bytes]) -> str | None:
        return None if found == [str(r).encode() for r in range(draw.size)] else f"all_gather gave {found}"

    return Case("init", [argument] * draw.size, call, judge, argument.meaning)


def open_and_close(passed: dict[str, Any]) -> list[bytes]:
    """The ranks' numbers, exchanged in a world that these arguments, and variables of the environment, make."""
    variables = {name: value for name, value in passed.items() if name in _ENVIRONMENT}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        world = pipemoe.init(**{name: value for name, value in passed.items() if name not in variables})
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    with world:
        return world.all_gather(str(world.rank).encode())
