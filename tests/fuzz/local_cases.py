"""Functions that concern one process alone: quantise_experts, local_range."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import pipemoe
from pipemoe import ExpertWeights
from pipemoe.e4m3 import BLOCK
from pipemoe.experts import dequantise_experts, quantise_experts
from tests.fuzz.case import ODD, RIGHT, WRONG, Argument, Case, Draw
from tests.fuzz.odd import odd_number, odd_value
from tests.fuzz.stage import Stage
from tests.moe_cases import norm_ratio


def quantise(draw: Draw, stage: Stage) -> Case:
    """quantise_experts of odd weights; what it gives is near what it got."""
    random = draw.random
    generator = torch.Generator().manual_seed(random.randrange(5))
    hidden, width = random.choice(((BLOCK, BLOCK), (2 * BLOCK, BLOCK), (100, 30)))
    right = ExpertWeights(
        torch.randn(2, 2 * width, hidden, generator=generator), torch.randn(2, hidden, width, generator=generator)
    )
    what, value = odd_value(random)
    field = random.choice([f.name for f in dataclasses.fields(ExpertWeights)])
    bad = right.down.clone()
    bad[0, 0, 0] = random.choice((torch.nan, torch.inf, -torch.inf))
    choices: dict[str, tuple[Any, str]] = {
        "right weights": (right, RIGHT),
        "none of them": (dataclasses.replace(right, gate_up=right.gate_up[:0], down=right.down[:0]), RIGHT),
        "bfloat16": (dataclasses.replace(right, gate_up=right.gate_up.bfloat16(), down=right.down.bfloat16()), RIGHT),
        "zeros": (dataclasses.replace(right, down=torch.zeros_like(right.down)), RIGHT),
        "tiny values": (dataclasses.replace(right, down=right.down * 1e-40), ODD),
        "huge values": (dataclasses.replace(right, down=right.down * 1e37), ODD),
        "no number": (dataclasses.replace(right, down=bad), ODD),
        "quantised twice": (quantise_experts(right), ODD),
        "column-major": (dataclasses.replace(right, down=right.down.transpose(1, 2).contiguous().transpose(1, 2)), ODD),
        f"weights are {what}": (value, WRONG),
        f"{field} is {what}": (dataclasses.replace(right, **{field: value}), ODD),
    }
    name = random.choice(list(choices))
    weights, meaning = choices[name]

    def judge(found: ExpertWeights) -> str | None:
        if meaning != RIGHT:
            return None
        back = dequantise_experts(found, torch.float32)
        ratios = [
            norm_ratio(b, w)
            for b, w in ((back.gate_up, weights.gate_up), (back.down, weights.down))
            if w.numel() and w.any()
        ]
        return None if all(ratio < 0.05 for ratio in ratios) else f"off by {ratios}"

    return Case(
        "quantise_experts", [Argument(name, weights)], lambda: quantise_experts(weights), judge, meaning, is_local=True
    )


def local_range(draw: Draw, stage: Stage) -> Case:
    """pipemoe.local_range of odd numbers."""
    random = draw.random
    passed, names = [7, 3, 1], ["7", "3", "1"]
    at = random.randrange(3)
    names[at], passed[at] = random.choice((odd_value(random), odd_number(random, passed[at])))

    def judge(found: Any) -> str | None:
        return None if isinstance(found, range) else f"it gave a {type(found).__name__}"

    return Case(
        "local_range",
        [Argument(", ".join(names), passed)],
        lambda: pipemoe.local_range(*passed),
        judge,
        ODD,
        is_local=True,
    )
