"""PipelinedMoE's call of one layer: forms of tensors, and values."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch

from tests.fuzz.case import ODD, RIGHT, WRONG, Argument, Case, Draw, wanted_of
from tests.fuzz.odd import odd_value
from tests.fuzz.stage import MOST_TOKENS, SETTINGS, Stage
from tests.moe_cases import NUM_EXPERTS, make_rows, norm_ratio

Rows = tuple[Any, Any, Any]  # x, ids, weights


def some_rows(random: Random, most: int = 6) -> Rows:
    return make_rows(random.choice((0, 1, 2, most)), random.randrange(20), torch.device("cpu"), torch.float32)


def _changed(tensor: torch.Tensor, value: float, random: Random) -> torch.Tensor:
    """With one value of it set."""
    tensor = tensor.clone()
    tensor[random.randrange(tensor.shape[0]), random.randrange(tensor.shape[1])] = value
    return tensor


def _every_other(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, dim=1)[:, ::2]


def _column_major(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous().t()


def _in_inference_mode(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor.clone()


# The same values in another form.
_FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "every other column": _every_other,
    "column-major": _column_major,
    "in a wider tensor": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
    "made in inference mode": _in_inference_mode,
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "read-only memory": lambda t: torch.from_numpy(np.array(t)),
}

# What no argument of a call may be.
_NO_TENSOR: dict[str, Callable[[torch.Tensor], Any]] = {
    "a list": lambda t: t.tolist(),
    "a numpy array": lambda t: t.numpy(),
    "None": lambda t: None,
    "with a dimension more": lambda t: t[None],
    "flat": lambda t: t.reshape(-1),
    "0-d": lambda t: torch.tensor(1),
    "a column short": lambda t: t[:, :-1],
    "a column more": lambda t: torch.cat([t, t[:, :1]], dim=1),
    "a row more": lambda t: torch.cat([t, t.new_ones(1, t.shape[1])]),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "complex": lambda t: t.to(torch.complex64),
    "bool": lambda t: t.bool(),
    "uint8": lambda t: t.to(torch.uint8),
}


def mutated_rows(random: Random) -> Argument:
    x, ids, weights = rows = some_rows(random)
    names = ("x", "topk_ids", "topk_weights")
    place, kind = random.randrange(3), random.randrange(10)
    name, tensor = names[place], rows[place]
    if kind < 3:
        form = random.choice(list(_FORMS))
        value, what, meaning = _FORMS[form](tensor), f"{name} is {form}", RIGHT
    elif kind < 6:
        form = random.choice(list(_NO_TENSOR))
        value, what, meaning = _NO_TENSOR[form](tensor), f"{name} is {form}", WRONG
    elif kind < 7:
        what, value = odd_value(random)
        what, meaning = f"{name} is {what}", WRONG
    else:
        return _odd_values(random)
    passed = [*rows]
    passed[place] = value
    return Argument(what, tuple(passed), meaning, rows)


def _odd_values(random: Random) -> Argument:
    x, ids, weights = make_rows(random.choice((1, 5)), random.randrange(20), torch.device("cpu"), torch.float32)
    many = make_rows(MOST_TOKENS + 1, 0, torch.device("cpu"), torch.float32)
    graded = x.clone().requires_grad_()
    choices: dict[str, tuple[Rows, str]] = {
        "NaN in x": ((_changed(x, torch.nan, random), ids, weights), ODD),
        "infinity in x": ((_changed(x, torch.inf, random), ids, weights), ODD),
        "huge x": ((x * 1e18, ids, weights), ODD),
        "tiny x": ((x * 1e-42, ids, weights), ODD),
        "x that wants gradients": ((graded, ids, weights), ODD),
        "id -1": ((x, _changed(ids, -1, random), weights), RIGHT),
        "id -2": ((x, _changed(ids, -2, random), weights), WRONG),
        "id E": ((x, _changed(ids, NUM_EXPERTS, random), weights), WRONG),
        "a huge id": ((x, _changed(ids, 2**40, random), weights), WRONG),
        "an id that int32 would wrap": ((x, _changed(ids, 2**32, random), weights), WRONG),
        "an id twice": ((x, torch.zeros_like(ids), weights), ODD),
        "int32 ids": ((x, ids.int(), weights), RIGHT),
        "int16 ids": ((x, ids.short(), weights), WRONG),
        "float ids": ((x, ids.float(), weights), WRONG),
        "NaN weight": ((x, ids, _changed(weights, torch.nan, random)), WRONG),
        "infinite weight": ((x, ids, _changed(weights, -torch.inf, random)), WRONG),
        "negative weight": ((x, ids, _changed(weights, -2.0, random)), RIGHT),
        "no weight": ((x, ids, torch.zeros_like(weights)), RIGHT),
        "float64 weights": ((x, ids, weights.double()), ODD),
        "half weights": ((x, ids, weights.half()), RIGHT),
        "bfloat16 weights": ((x, ids, weights.bfloat16()), RIGHT),
        "integer weights": ((x, ids, torch.ones_like(ids)), WRONG),
        "float64 x": ((x.double(), ids, weights), WRONG),
        "bfloat16 x": ((x.bfloat16(), ids, weights), WRONG),
        "expanded x": ((x[:1].expand(len(x), -1), ids, weights), RIGHT),
        "expanded ids": ((x, ids[:1].expand(len(x), -1), weights), RIGHT),
        "too many rows": (many, WRONG),
        "swapped": ((x, weights, ids), WRONG),
    }
    name = random.choice(list(choices))
    passed, meaning = choices[name]
    return Argument(name, passed, meaning, None if name == "x that wants gradients" else passed)


def _right(random: Random) -> Argument:
    rows = some_rows(random)
    return Argument(f"{len(rows[0])} rows", rows, RIGHT, rows)


def judge_sums(y: Any, layers: Any, layer: int, rows: Rows) -> str | None:
    """What is wrong with the sums of `rows`; rows that are not finite are nobody's business."""
    x, ids, weights = rows
    if not isinstance(y, torch.Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return f"the result is a {type(y).__name__} of {getattr(y, 'shape', None)} and {getattr(y, 'dtype', None)}"
    wanted = layers.oracle(layer, x, ids.long(), weights.float())
    finite = torch.isfinite(wanted.float()).all(dim=1)
    ratio = norm_ratio(y.detach()[finite], wanted[finite]) if finite.any() and wanted[finite].norm() > 1e-6 else 0.0
    return None if ratio < 1e-5 else f"the sums are off by {ratio}"


def layer_call(draw: Draw, stage: Stage) -> Case:
    """moe(x, ids, weights) of one layer."""
    setting = draw.random.randrange(len(SETTINGS))
    arguments = draw.per_rank(mutated_rows, _right)
    mine = arguments[draw.rank]
    moe, layers = stage.moe(1, setting), stage.layers(1)

    def call() -> Any:
        return moe(*mine.value)

    def judge(y: Any) -> str | None:
        return None if mine.same is None else judge_sums(y, layers, 0, mine.same)

    return Case("moe(x, ids, weights)", arguments, call, judge, wanted_of([a._replace(same=None) for a in arguments]))
