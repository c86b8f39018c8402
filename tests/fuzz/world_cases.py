"""What ranks do together: world.all_gather, and calls that do not belong together."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch

from pipemoe import Config, load_model
from tests.fuzz.case import ODD, RIGHT, WRONG, Argument, Case, Draw, any_result, wanted_of
from tests.fuzz.odd import odd_value
from tests.fuzz.stage import Stage, new_moe
from tests.models.tiny import FAMILIES
from tests.moe_cases import make_rows


def all_gather(draw: Draw, stage: Stage) -> Case:
    """world.all_gather(payload, doing)."""

    def mutated(random: Random) -> Argument:
        name, value = odd_value(random)
        choices: dict[str, tuple[tuple, str, Any]] = {
            "a large payload": ((b"x" * random.randrange(400, 10**6),), RIGHT, ""),
            "an empty payload": ((b"",), RIGHT, ""),
            "bytearray": ((bytearray(b"abc"),), ODD, ""),
            "memoryview": ((memoryview(b"abc"),), ODD, ""),
            f"payload is {name}": ((value,), ODD, ""),
            f"doing is {name}": ((b"a", value), ODD, ""),
            "another doing": ((b"a", f"this {random.randrange(3)}"), RIGHT, "other"),
            "a long doing": ((b"a", "x" * random.choice((500, 65535, 65536, 10**6))), ODD, ""),
        }
        what = random.choice(list(choices))
        passed, meaning, same = choices[what]
        return Argument(what, passed, meaning, passed[1] if same else "all_gather")

    arguments = draw.per_rank(
        mutated, lambda random: Argument("a payload", (b"abc" * random.randrange(300),), RIGHT, "all_gather")
    )

    def call() -> Any:
        return stage.world.all_gather(*arguments[draw.rank].value)

    def judge(found: Any) -> str | None:
        if not all(a.meaning == RIGHT for a in arguments):
            return None
        return None if found == [a.value[0] for a in arguments] else "other payloads came than were sent"

    return Case("world.all_gather", arguments, call, judge, wanted_of(arguments))


def mixed(draw: Draw, stage: Stage) -> Case:
    """Each rank a valid call of its own: an error on all of them unless they happen to be the same."""
    model, moe, two = stage.model(FAMILIES[0], 0), stage.moe(1, 0), stage.moe(2, 0)
    small = Config(max_tokens_per_rank=16, moe_max_num_tokens=8, num_slots=1)

    rows = make_rows(3, 0, torch.device("cpu"), torch.float32)

    def empty_step() -> None:
        with two.step(0):
            pass

    calls: dict[str, Callable[[], Any]] = {
        "prefill": lambda: model.prefill([[1, 2]]),
        "a prefill of nothing": lambda: model.prefill([]),
        "another model's prefill": lambda: stage.model(FAMILIES[1], 0).prefill([[1, 2]]),
        "a call": lambda: moe(*rows),
        "a step": empty_step,
        "all_gather": lambda: stage.world.all_gather(b""),
        "with_config": lambda: model.with_config(small),
        "PipelinedMoE": lambda: new_moe(stage, small),
        "load_model": lambda: load_model(stage.checkpoint(FAMILIES[0]), stage.world, config=small),
    }
    stage.model(FAMILIES[1], 0)
    stage.checkpoint(FAMILIES[0])
    names = [draw.random.choice([*calls]) for _ in range(draw.size)]
    if len(set(names)) < draw.size:  # different ones are what this is about
        names = draw.random.sample([*calls], draw.size)
    same = [name.removeprefix("a ").removesuffix(" of nothing") for name in names]
    wanted = RIGHT if len(set(same)) == 1 else WRONG
    return Case(
        "other calls on other ranks",
        [Argument(name, None) for name in names],
        calls[names[draw.rank]],
        any_result,
        wanted,
        makes=True,
    )
