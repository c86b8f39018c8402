"""PipelinedMoE's constructor: weights of the wrong shape, type, place and value, and what comes with them."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any

import torch

from pipemoe import Config, ExpertWeights, PipelinedMoE
from tests.fuzz.case import ODD, RIGHT, WRONG, Argument, Case, Draw, wanted_of
from tests.fuzz.layer_cases import judge_sums
from tests.fuzz.odd import odd_number, odd_value
from tests.fuzz.stage import Stage
from tests.moe_cases import NUM_EXPERTS, TOP_K, make_rows

_NUM_LAYERS = 2


def _odd_weights(random: Random, weights: list[ExpertWeights]) -> Argument:
    name, value = odd_value(random)
    one = weights[0]
    field = random.choice([f.name for f in dataclasses.fields(ExpertWeights)])
    number, odd = odd_number(random, one.first_expert)

    def with_first(**fields: Any) -> list[ExpertWeights]:
        return [dataclasses.replace(one, **fields), *weights[1:]]

    def poisoned(bad: float) -> torch.Tensor:
        tensor = one.down.clone()
        tensor[random.randrange(len(tensor)), 1, 2] = bad
        return tensor

    choices: dict[str, tuple[Any, str]] = {
        "a tuple": (tuple(weights), RIGHT),
        "a generator": ((w for w in weights), ODD),
        "none": ([], WRONG),
        "one ExpertWeights, no list": (one, WRONG),
        f"{name}": (value, WRONG),
        f"entries that are {name}": ([value], WRONG),
        "a layer fewer": (weights[:-1], ODD),
        "a layer more": ([*weights, one], ODD),
        f"{field} is {name}": (with_first(**{field: value}), ODD),
        f"first_expert is {number}": (with_first(first_expert=odd), ODD),
        "NaN in down": (with_first(down=poisoned(torch.nan)), WRONG),
        "infinity in down": (with_first(down=poisoned(torch.inf)), WRONG),
        "down in float64": (with_first(down=one.down.double()), WRONG),
        "all in float64": (with_first(down=one.down.double(), gate_up=one.gate_up.double()), ODD),
        "all in int8": (with_first(down=one.down.to(torch.int8), gate_up=one.gate_up.to(torch.int8)), WRONG),
        "all in complex": (with_first(down=one.down.cfloat(), gate_up=one.gate_up.cfloat()), WRONG),
        "all meta": (with_first(down=one.down.to("meta"), gate_up=one.gate_up.to("meta")), WRONG),
        "all sparse": (with_first(down=one.down.to_sparse(), gate_up=one.gate_up.to_sparse()), WRONG),
        "in e4m3 without scales": (
            with_first(down=one.down.to(torch.float8_e4m3fn), gate_up=one.gate_up.to(torch.float8_e4m3fn)),
            WRONG,
        ),
        "down transposed": (with_first(down=one.down.transpose(1, 2)), WRONG),
        "gate_up of half the rows": (with_first(gate_up=one.gate_up[:, : one.intermediate].contiguous()), WRONG),
        "another width of one layer": (
            with_first(gate_up=one.gate_up[:, ::2].contiguous(), down=one.down[:, :, ::2].contiguous()),
            ODD,
        ),
        "another hidden of one layer": (
            with_first(gate_up=one.gate_up[:, :, 1:].contiguous(), down=one.down[:, 1:].contiguous()),
            ODD,
        ),
        "an expert short": (with_first(gate_up=one.gate_up[1:], down=one.down[1:]), WRONG),
        "scales of ones": (with_first(gate_up_scales=torch.ones(1), down_scales=torch.ones(1)), WRONG),
        "zero biases": (
            with_first(gate_up_bias=torch.zeros(one.gate_up.shape[:2]), down_bias=torch.zeros(one.down.shape[:2])),
            ODD,
        ),
        "a bias of the wrong size": (with_first(down_bias=torch.zeros(1)), WRONG),
        "gelu": (with_first(activation="gelu"), ODD),
        "numpy": (with_first(gate_up=one.gate_up.numpy(), down=one.down.numpy()), WRONG),
        "column-major": (with_first(down=one.down.transpose(1, 2).contiguous().transpose(1, 2)), ODD),
    }
    what = random.choice(list(choices))
    value, meaning = choices[what]
    return Argument(f"weights: {what}", {"weights": value}, meaning, "" if meaning == RIGHT else None)


def constructor(draw: Draw, stage: Stage) -> Case:
    """PipelinedMoE(world, weights, num_experts=, top_k=, config=)."""
    layers = stage.layers(_NUM_LAYERS)
    own = [layers.local(draw.size, rank) for rank in range(draw.size)]
    ranks = iter(range(draw.size))

    def mutated(random: Random) -> Argument:
        rank = next(ranks)
        kind = random.randrange(10)
        if kind < 6:
            return _odd_weights(random, own[rank])
        name = random.choice(("num_experts", "top_k", "config", "world"))
        near = {"num_experts": NUM_EXPERTS, "top_k": TOP_K}.get(name)
        what, value = odd_value(random) if near is None or kind < 8 else odd_number(random, near)
        return Argument(f"{name} is {what}", {name: value}, ODD)

    def right(_: Random) -> Argument:
        next(ranks)
        return Argument("nothing odd", {}, RIGHT, "")

    arguments = draw.per_rank(mutated, right)
    config = Config(max_tokens_per_rank=16, moe_max_num_tokens=8, num_slots=1)
    rows = make_rows(3, draw.rank, torch.device("cpu"), torch.float32)
    mine = arguments[draw.rank].value

    def call() -> Any:
        right = {
            "world": stage.world,
            "weights": own[draw.rank],
            "num_experts": NUM_EXPERTS,
            "top_k": TOP_K,
            "config": config,
        }
        return PipelinedMoE(**(right | mine))

    def judge(moe: PipelinedMoE) -> str | None:
        if any(a.meaning != RIGHT for a in arguments):
            return None
        with moe.step(3) as step:
            return judge_sums(step(0, *rows), layers, 0, rows) or judge_sums(step(1, *rows), layers, 1, rows)

    return Case("PipelinedMoE(...)", arguments, call, judge, wanted_of(arguments), makes=True)
