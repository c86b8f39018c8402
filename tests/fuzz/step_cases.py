"""Steps through several layers: what `step` takes, the order of calls, exceptions and other calls inside."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import torch

from pipemoe import PipelinedMoE
from pipemoe.errors import PipemoeError
from tests.fuzz.case import ODD, RIGHT, Argument, Case, Draw, Planted, wanted_of
from tests.fuzz.layer_cases import judge_sums, mutated_rows
from tests.fuzz.odd import odd_number, odd_value
from tests.fuzz.stage import SETTINGS, Stage
from tests.moe_cases import make_rows

_NUM_LAYERS = 2
_BREAKS = (Planted, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, StopIteration)


class _Misstep:
    """What a caller does with its step; `run` goes through it."""

    def __init__(self, random: Random, name: str) -> None:
        self.name, self.at = name, random.randrange(_NUM_LAYERS)
        self.rows = make_rows(random.choice((0, 1, 5)), random.randrange(20), torch.device("cpu"), torch.float32)
        count = len(self.rows[0])
        self.more_rows = make_rows(count + 1, 0, torch.device("cpu"), torch.float32)
        self.wrong = mutated_rows(random)
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
        more = {"wrong rows": self.wrong.name, "raises inside": self.error.__name__}.get(
            self.name, self.odd_name if "odd" in self.name else ""
        )
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
    *(
        "odd num_tokens",
        "odd lengths",
        "an odd length",
        "lengths that do not add up",
        "a zero length",
        "lengths as a generator",
        "lengths",
        "lengths from numpy",
    ),
    *(
        "left early",
        "raises inside",
        "raises inside",
        "an odd layer",
        "a layer out of order",
        "wrong rows",
        "wrong rows, mended",
    ),
    *(
        "more rows than said",
        "a step inside",
        "a call inside",
        "all_gather inside",
        "called after its end",
        "entered again",
        "nothing odd",
    ),
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
        return next(
            filter(None, (judge_sums(y, stage.layers(_NUM_LAYERS), layer, mine.rows) for layer, y in enumerate(given))),
            None,
        )

    return Case(
        "moe.step",
        arguments,
        lambda: mine.run(moe, stage),
        judge,
        wanted_of(arguments),
        may_defer=True,
        own_errors=_BREAKS,
    )
