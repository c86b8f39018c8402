"""Config, and models under another one."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any

import torch

import pipemoe
from pipemoe import Config
from pipemoe.errors import PipemoeError
from pipemoe.plan.config import COMBINES, MODES, OBJECTIVES
from tests.fuzz.case import ODD, RIGHT, WRONG, Argument, Case, Draw, any_result, wanted_of
from tests.fuzz.odd import odd_number, odd_value
from tests.fuzz.stage import MOST_TOKENS, SETTINGS, SMALL, Stage, judge_prefilled
from tests.models.tiny import FAMILIES

_VALUES: dict[str, tuple[Any, ...]] = {
    "mode": MODES,
    "moe_max_num_tokens": (1, 2, 7, 96, 1000),
    "max_tokens_per_rank": (60, 96, 500),
    "num_slots": (None, 1, 2, 4),
    "combine": COMBINES,
    "pipelined_ratio": (1, 2, 100),
    "objective": OBJECTIVES,
    "makespan_budget": (0, 0.0, 1.5, 100),
    "num_sms": (None,),
    "dispatch_dtype": (None,),
    "combine_dtype": (None, "float32"),
    "deterministic": (False, True),
    "experts": ("auto",),
    "graph_tokens": (0, 1, 4096),
    "debug": (False, True),
    "cost": (None,),
}
_ODD_VALUES: dict[str, tuple[Any, ...]] = {
    "mode": ("", "AUTO", "auto ", "none"),
    "moe_max_num_tokens": (10**9, 2**31, 2**62),
    "max_tokens_per_rank": (1, 10**9, 2**31, 2**62),
    "num_slots": (5, 2000, 2**40),
    "num_sms": (1, 10**6),
    "dispatch_dtype": ("float8_e4m3fn", "float32", torch.float8_e4m3fn),
    "combine_dtype": ("bfloat16", "float16", "float64", torch.float32),
    "experts": ("host", "hopper", "hopper_fp8", "torch_cuda", "ampere", "", "nonsense"),
    "graph_tokens": (10**12, -1),
    "cost": ("nowhere.json", "", ".", "/dev/null", "a\0b"),
    "objective": ("weighted", "MEAN", "", "p99"),
    "makespan_budget": (float("nan"), -0.1, 101, float("inf"), True),
}


def _settings(random: Random) -> Argument:
    """Arguments of Config, most of them right."""
    chosen = {name: random.choice(_VALUES[name]) for name in random.sample(list(_VALUES), random.randrange(5))}
    chosen = {**SMALL, **chosen}
    name = random.choice([f.name for f in dataclasses.fields(Config)])
    kind = random.randrange(5)
    if kind == 0:
        return Argument(
            f"right values of {', '.join(chosen)}",
            chosen,
            ODD if "num_slots" in chosen else RIGHT,
            repr(Config(**chosen)),
        )
    if kind == 1 and name in _ODD_VALUES:
        value = random.choice(_ODD_VALUES[name])
        what = f"{value!r}"
    elif kind == 2:
        what, value = odd_number(random, 7)
    else:
        what, value = odd_value(random)
    return Argument(f"{name} is {what}", chosen | {name: value}, ODD)


def config(draw: Draw, stage: Stage) -> Case:
    """Config(...), a matter of one rank; where all ranks' can be made, a model with it."""
    family = draw.random.choice(FAMILIES)
    arguments = draw.per_rank(_settings, lambda _: Argument("nothing odd", SMALL, RIGHT, repr(Config(**SMALL))))
    model = stage.model(family, 0)
    try:
        configs = [Config(**a.value) for a in arguments]
    except PipemoeError:
        configs = []
    except Exception as error:  # noqa: BLE001  (judged below)
        return Case("Config(...)", arguments, lambda error=error: _again(error), any_result, ODD, is_local=True)
    if not configs:
        return Case(
            "Config(...)", arguments, lambda: Config(**arguments[draw.rank].value), any_result, ODD, is_local=True
        )

    def judge(with_it: pipemoe.Model) -> str | None:
        sequences = [[1, 2, 3], [4]] if configs[draw.rank].max_tokens_per_rank >= 4 else [[1]]
        found = with_it.prefill(sequences, keep_logits=True)
        return judge_prefilled(family, found, sequences) if _is_exact(configs[draw.rank]) else None

    return Case(
        "model.with_config",
        arguments,
        lambda: model.with_config(configs[draw.rank]),
        judge,
        wanted_of(arguments),
        makes=True,
    )


def _is_exact(made: Config) -> bool:
    return made.dispatch_dtype is None and made.experts != "hopper_fp8" and made.combine_dtype in (None, "float32")


def _again(error: BaseException) -> str:
    raise error


def with_config(draw: Draw, stage: Stage) -> Case:
    """with_config of what is no Config."""
    model = stage.model(draw.random.choice(FAMILIES), draw.random.randrange(len(SETTINGS)))

    def mutated(random: Random) -> Argument:
        what, value = odd_value(random)
        return Argument(f"config is {what}", value, WRONG)

    arguments = draw.per_rank(mutated, lambda _: Argument("nothing odd", Config(max_tokens_per_rank=MOST_TOKENS)))
    mine = arguments[draw.rank].value
    return Case(
        "model.with_config of no Config",
        arguments,
        lambda: model.with_config(mine),
        any_result,
        wanted_of(arguments),
        makes=True,
    )
