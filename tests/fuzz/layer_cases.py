"""PipelinedMoE: its constructor, the call of one layer, and steps through several."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch

from pipemoe import Config, ExpertWeights, PipelinedMoE, load_model
from pipemoe.errors import PipemoeError
from tests.fuzz.case import ODD, RIGHT, WRONG, Argument, Case, Draw, Planted, any_result, wanted_of
from tests.fuzz.odd import odd_number, odd_value, some_error
from tests.fuzz.stage import MOST_TOKENS, SETTINGS, Stage, new_moe
from tests.models.tiny import FAMILIES
from tests.moe_cases import NUM_EXPERTS, TOP_K, make_rows, norm_ratio

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


def _mutated(random: Random) -> Argument:
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
    x, ids, weights = rows = make_rows(random.choice((1, 5)), random.randrange(20), torch.device("cpu"), torch.float32)
    many = make_rows(MOST_TOKENS + 1, 0, torch.device("cpu"), torch.float32)
    graded = x.clone().requires_grad_()
    choices: dict[str, tuple[Rows, str]] = {
        "NaN in x": ((_changed(x, torch.nan, random), ids, weights), ODD),
        "infinity in x": ((_changed(x, torch.inf, random), ids, weights), ODD),
        "huge x": ((x * 1e18, ids, weights), ODD),
        "tiny x": ((x * 1e-42, ids, weights), ODD),
        "x that wants gradients": ((graded, ids, weights), ODD),
        "id -1": ((x, _changed(ids, -1, random), weights), WRONG),
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


def _judge(y: Any, layers: Any, layer: int, rows: Rows) -> str | None:
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
    arguments = draw.per_rank(_mutated, _right)
    mine = arguments[draw.rank]
    moe, layers = stage.moe(1, setting), stage.layers(1)

    def call() -> Any:
        return moe(*mine.value)

    def judge(y: Any) -> str | None:
        return None if mine.same is None else _judge(y, layers, 0, mine.same)

    return Case("moe(x, ids, weights)", arguments, call, judge, wanted_of([a._replace(same=None) for a in arguments]))


# --- steps through two layers

_NUM_LAYERS = 2
_BREAKS = (Planted, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, StopIteration)


class _Misstep:
    """What a caller does with its step; `run` goes through it."""

    def __init__(self, random: Random, name: str) -> None:
        self.name, self.at = name, random.randrange(_NUM_LAYERS)
        self.rows = make_rows(random.choice((0, 1, 5)), random.randrange(20), torch.device("cpu"), torch.float32)
        count = len(self.rows[0])
        self.more_rows = make_rows(count + 1, 0, torch.device("cpu"), torch.float32)
        self.wrong = _mutated(random)
        self.odd_name, self.odd = random.choice((odd_value, lambda r: odd_number(r, max(count, 1))))(random)
        self.error, self.layer = random.choice(_BREAKS), random.choice((-1, 1 - self.at, 7))
        self.num_tokens = self.odd if self.name == "odd num_tokens" else count
        self.lengths = {
            "odd lengths": self.odd,
            "an odd length": [count, self.odd],
            "lengths that do not add up": [count + 1],
            "a zero length": [count, 0],
            "lengths as a generator": (1 for _ in range(count)),
            "lengths": (1,) * count,
            "lengths from numpy": np.ones(count, np.int32),
        }.get(self.name)

    @property
    def text(self) -> str:
        more = {"wrong rows": self.wrong.name, "raises inside": self.error.__name__}.get(self.name, self.odd_name if "odd" in self.name else "")
        return f"{self.name}{': ' * bool(more)}{more} (layer {self.at}, {len(self.rows[0])} rows)"

    def run(self, moe: PipelinedMoE, stage: Stage) -> list[Any]:
        step, given = moe.step(self.num_tokens, self.lengths), []
        with step:
            for layer in range(_NUM_LAYERS):
                if layer == self.at and self._misbehave(moe, stage, step, layer) == "leave":
                    break
                given.append(step(layer, *self.rows))
        if self.name == "called after its end":
            step(0, *self.rows)
        elif self.name == "entered again":
            with step:
                pass
        return given

    def _misbehave(self, moe: PipelinedMoE, stage: Stage, step: Any, layer: int) -> str | None:
        x, ids, weights = self.rows
        if self.name == "left early":
            return "leave"
        if self.name == "raises inside":
            raise self.error("planted in the step")
        if self.name == "an odd layer":
            step(self.odd, *self.rows)
        elif self.name == "a layer out of order":
            step(self.layer, *self.rows)
        elif self.name == "wrong rows":
            step(layer, *self.wrong.value)
        elif self.name == "wrong rows, mended":
            try:
                step(layer, x, ids.float(), weights)
            except PipemoeError:
                pass
        elif self.name == "more rows than said":
            step(layer, *self.more_rows)
        elif self.name == "a step inside":
            with moe.step(0):
                pass
        elif self.name == "a call inside":
            stage.moe(1, 0)(*self.rows)
        elif self.name == "all_gather inside":
            stage.world.all_gather(b"")
        return None


_MISSTEPS = (
    *("odd num_tokens", "odd lengths", "an odd length", "lengths that do not add up", "a zero length", "lengths as a generator", "lengths", "lengths from numpy"),
    *("left early", "raises inside", "raises inside", "an odd layer", "a layer out of order", "wrong rows", "wrong rows, mended"),
    *("more rows than said", "a step inside", "a call inside", "all_gather inside", "called after its end", "entered again", "nothing odd"),
)
_HARMLESS = ("lengths", "wrong rows, mended", "nothing odd")


def _misstep(random: Random) -> Argument:
    misstep = _Misstep(random, random.choice(_MISSTEPS))
    return Argument(misstep.text, misstep, RIGHT if misstep.name in _HARMLESS else ODD)


def _plain_step(random: Random) -> Argument:
    return Argument("nothing odd", _Misstep(random, "nothing odd"))


def steps(draw: Draw, stage: Stage) -> Case:
    """`with moe.step(...)`: arguments, order of layers, exceptions inside, other calls inside."""
    arguments = draw.per_rank(_misstep, _plain_step)
    moe = stage.moe(_NUM_LAYERS, draw.random.randrange(len(SETTINGS)))
    stage.moe(1, 0)
    mine = arguments[draw.rank].value

    def judge(given: list[Any]) -> str | None:
        return next(filter(None, (_judge(y, stage.layers(_NUM_LAYERS), layer, mine.rows) for layer, y in enumerate(given))), None)

    return Case("moe.step", arguments, lambda: mine.run(moe, stage), judge, wanted_of(arguments), may_defer=True, own_errors=_BREAKS)


# --- the constructor


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
        "in e4m3 without scales": (with_first(down=one.down.to(torch.float8_e4m3fn), gate_up=one.gate_up.to(torch.float8_e4m3fn)), WRONG),
        "down transposed": (with_first(down=one.down.transpose(1, 2)), WRONG),
        "gate_up of half the rows": (with_first(gate_up=one.gate_up[:, : one.intermediate].contiguous()), WRONG),
        "another width of one layer": (with_first(gate_up=one.gate_up[:, ::2].contiguous(), down=one.down[:, :, ::2].contiguous()), ODD),
        "another hidden of one layer": (with_first(gate_up=one.gate_up[:, :, 1:].contiguous(), down=one.down[:, 1:].contiguous()), ODD),
        "an expert short": (with_first(gate_up=one.gate_up[1:], down=one.down[1:]), WRONG),
        "scales of ones": (with_first(gate_up_scales=torch.ones(1), down_scales=torch.ones(1)), WRONG),
        "zero biases": (with_first(gate_up_bias=torch.zeros(one.gate_up.shape[:2]), down_bias=torch.zeros(one.down.shape[:2])), ODD),
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
        right = {"world": stage.world, "weights": own[draw.rank], "num_experts": NUM_EXPERTS, "top_k": TOP_K, "config": config}
        return PipelinedMoE(**(right | mine))

    def judge(moe: PipelinedMoE) -> str | None:
        if any(a.meaning != RIGHT for a in arguments):
            return None
        with moe.step(3) as step:
            return _judge(step(0, *rows), layers, 0, rows) or _judge(step(1, *rows), layers, 1, rows)

    return Case("PipelinedMoE(...)", arguments, call, judge, wanted_of(arguments), makes=True)


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

    arguments = draw.per_rank(mutated, lambda random: Argument("a payload", (b"abc" * random.randrange(300),), RIGHT, "all_gather"))

    def call() -> Any:
        return stage.world.all_gather(*arguments[draw.rank].value)

    def judge(found: Any) -> str | None:
        if not all(a.meaning == RIGHT for a in arguments):
            return None
        return None if found == [a.value[0] for a in arguments] else "other payloads came than were sent"

    return Case("world.all_gather", arguments, call, judge, wanted_of(arguments))


def mixed(draw: Draw, stage: Stage) -> Case:
    """Each rank a valid call of its own: an error on all of them unless they happen to be the same."""
    model, moe, two = stage.model(FAMILIES[0], 0), stage.moe(1, 0), stage.moe(_NUM_LAYERS, 0)
    small = Config(max_tokens_per_rank=16, moe_max_num_tokens=8, num_slots=1)

    def empty_step() -> None:
        with two.step(0):
            pass

    calls: dict[str, Callable[[], Any]] = {
        "prefill": lambda: model.prefill([[1, 2]]),
        "a prefill of nothing": lambda: model.prefill([]),
        "another model's prefill": lambda: stage.model(FAMILIES[1], 0).prefill([[1, 2]]),
        "a call": lambda: moe(*make_rows(3, 0, torch.device("cpu"), torch.float32)),
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
    return Case("other calls on other ranks", [Argument(name, None) for name in names], calls[names[draw.rank]], any_result, wanted, makes=True)
