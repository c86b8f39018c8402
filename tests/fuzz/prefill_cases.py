"""Model.prefill: what sequences may look like, and everything else that it takes."""

from __future__ import annotations

import array
import collections
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch

from pipemoe.trace import Timeline
from tests.fuzz.case import ODD, RIGHT, WRONG, Argument, Case, Draw, Planted, wanted_of
from tests.fuzz.odd import odd_value, raising, some_error
from tests.fuzz.stage import MOST_TOKENS, POSITIONS, SETTINGS, Stage, judge_prefilled
from tests.models.tiny import FAMILIES, VOCAB


def some_sequences(random: Random, least: int = 0) -> list[list[int]]:
    """Up to three, few enough different ones that references can be kept."""
    return [
        Random(random.randrange(12)).choices(range(VOCAB), k=random.choice((1, 2, 3, 9, 20)))
        for _ in range(random.randint(least, 3))
    ]


class _Counting(list):
    """A list subclass."""


class _OddLength(list):
    def __len__(self) -> int:
        return 10**6


def _generator(values: Any, error: Callable[[], BaseException] | None = None) -> Any:
    yield from values
    if error is not None:
        raise error()


_NUMPY = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4", ">u2")
_TORCH = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)

# Ways to pass the same token ids. What the docs promise is RIGHT.
_FORMS: dict[str, tuple[Callable[[list[int]], Any], str]] = {
    "tuple": (tuple, RIGHT),
    "list subclass": (_Counting, RIGHT),
    "range": (lambda s: range(len(s)), ODD),
    "array.array": (lambda s: array.array("q", s), ODD),
    "deque": (collections.deque, ODD),
    "bytes": (bytes, ODD),
    "bytearray": (bytearray, ODD),
    "memoryview": (lambda s: memoryview(array.array("i", s)), ODD),
    "generator": (_generator, ODD),
    "map": (lambda s: map(int, s), ODD),
    "dict keys": (lambda s: dict.fromkeys(range(len(s))).keys(), ODD),
    "dict": (lambda s: dict(enumerate(s)), ODD),
    "list of numpy integers": (lambda s: [np.int64(n) for n in s], RIGHT),
    "list of 0-d tensors": (lambda s: [torch.tensor(n) for n in s], ODD),
    "list of objects with __index__": (lambda s: [type("I", (), {"__index__": lambda self, n=n: n})() for n in s], ODD),
    "numpy, every other": (lambda s: np.repeat(np.array(s), 2)[::2], ODD),
    "numpy, reversed twice": (lambda s: np.array(s[::-1])[::-1], ODD),
    "numpy, read only": (lambda s: np.frombuffer(np.array(s).tobytes(), dtype=np.int64), RIGHT),
    "numpy objects": (lambda s: np.array(s, dtype=object), ODD),
    "numpy masked": (lambda s: np.ma.array(s), ODD),
    "tensor, every other": (lambda s: torch.tensor(s).repeat_interleave(2)[::2], RIGHT),
    "tensor, inference": (lambda s: _in_inference_mode(s), RIGHT),
    "tensor, sparse": (lambda s: torch.tensor(s).to_sparse(), ODD),
    "tensor, sealed in a parameter": (lambda s: torch.nn.Parameter(torch.tensor(s), requires_grad=False), RIGHT),
    **{f"numpy {name}": (lambda s, n=name: np.array(s, dtype=n), ODD if ">" in name else RIGHT) for name in _NUMPY},
    **{f"{dtype}": (lambda s, d=dtype: torch.tensor(s, dtype=d), RIGHT) for dtype in _TORCH},
}


def _in_inference_mode(sequence: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.tensor(sequence)


# Sequences that are none.
_NO_SEQUENCE: dict[str, Callable[[list[int]], Any]] = {
    "empty": lambda s: [],
    "empty numpy": lambda s: np.zeros(0, np.int64),
    "floats": lambda s: [float(n) for n in s],
    "numpy floats": lambda s: np.array(s, float),
    "bfloat16 tensor": lambda s: torch.tensor(s).bfloat16(),
    "bools": lambda s: [True] * len(s),
    "a bool among ids": lambda s: [*s, True],
    "numpy bools": lambda s: np.ones(len(s), bool),
    "None among ids": lambda s: [*s, None],
    "strings": lambda s: [str(n) for n in s],
    "a string": lambda s: "1 2 3",
    "nested": lambda s: [s],
    "ragged": lambda s: [s, [1]],
    "2-d numpy": lambda s: np.array([s, s]),
    "0-d tensor": lambda s: torch.tensor(1),
    "negative id": lambda s: [*s, -1],
    "id of the vocabulary's size": lambda s: [VOCAB, *s],
    "a large id": lambda s: [*s, 2**31],
    "id beyond int64": lambda s: [*s, 2**63],
    "id of hundreds of digits": lambda s: [*s, 10**400],
    "uint64 beyond int64": lambda s: np.array([*s, 2**64 - 1], np.uint64),
    "int8 that wrapped": lambda s: np.array([1, -100], np.int8),
    "too long": lambda s: [1] * (POSITIONS + 1),
    "too many for the step": lambda s: [1] * (MOST_TOKENS + 1),
    "complex": lambda s: [1j],
    "complex numpy": lambda s: np.array(s, complex),
    "structured numpy": lambda s: np.zeros(2, [("a", "i4")]),
    "numpy dates": lambda s: np.array(["2026-01-01"], "M8[D]"),
    "meta tensor": lambda s: torch.zeros(3, dtype=torch.long, device="meta"),
    "a set of strings": lambda s: {"a"},
    "length that lies": lambda s: _OddLength(s),
}


def _mutated(random: Random) -> Argument:
    sequences = some_sequences(random, 1)
    place, kind = random.randrange(len(sequences)), random.randrange(12)
    passed: list[Any] = list(sequences)
    if kind < 5:
        name = random.choice(list(_FORMS))
        make, meaning = _FORMS[name]
        if name in ("range", "dict keys"):
            sequences[place] = list(range(len(sequences[place])))
        elif name in ("numpy i1", "torch.int8"):
            sequences[place] = [n % 128 for n in sequences[place]]
        passed[place] = make(sequences[place])
        return Argument(f"a sequence as {name}", passed, meaning, sequences)
    if kind < 8:
        name = random.choice(list(_NO_SEQUENCE))
        passed[place] = _NO_SEQUENCE[name](sequences[place])
        return Argument(f"a sequence that is {name}", passed, ODD if name == "length that lies" else WRONG, sequences)
    if kind == 8:
        name, value = odd_value(random)
        passed[place] = value
        return Argument(f"a sequence that is {name}", passed, ODD, None)
    if kind == 9:
        name, value = odd_value(random)
        return Argument(f"sequences are {name}", value, ODD, None)
    return _other_form(random, sequences)


def _other_form(random: Random, sequences: list[list[int]]) -> Argument:
    """The outer sequence, or an id, is what is odd."""
    error = some_error(random)
    same_length = [s[:1] for s in sequences]
    forms: dict[str, tuple[Any, str, Any]] = {
        "tuple": (tuple(sequences), RIGHT, sequences),
        "generator": (_generator(sequences), ODD, sequences),
        "generator that raises": (_generator(sequences, error), WRONG, None),
        "a generator sequence that raises": ([_generator(sequences[0], error)], WRONG, None),
        "dict values": (dict(enumerate(sequences)).values(), ODD, sequences),
        "deque": (collections.deque(sequences), ODD, sequences),
        "2-d numpy": (np.array(same_length), ODD, same_length),
        "2-d tensor": (torch.tensor(same_length), ODD, same_length),
        "one flat list": (sequences[0], WRONG, None),
        "too many": ([[1] * 33] * 3, WRONG, None),
        "ids that raise": ([[1, raising(error, "__index__", "__int__", "__float__", "__array__")]], WRONG, None),
        "an odd id": ([[1, odd_value(random)[1]]], ODD, None),
    }
    name = random.choice(list(forms))
    value, meaning, same = forms[name]
    return Argument(f"sequences as {name}", value, meaning, same)


def _right(random: Random) -> Argument:
    sequences = some_sequences(random)
    return Argument(f"{len(sequences)} sequences", sequences, RIGHT, sequences)


def prefill(draw: Draw, stage: Stage) -> Case:
    """Mutated sequences."""
    family, setting = draw.random.choice(FAMILIES), draw.random.randrange(len(SETTINGS))
    keep_logits = draw.random.random() < 0.5
    arguments = draw.per_rank(_mutated, _right)
    mine = arguments[draw.rank]
    model = stage.model(family, setting)

    def call() -> Any:
        return model.prefill(mine.value, keep_logits=keep_logits)

    def judge(found: Any) -> str | None:
        if mine.same is None:
            return None
        if (found.logits is not None) != (keep_logits and len(mine.same) > 0):
            return f"keep_logits is {keep_logits}, logits are {type(found.logits).__name__}"
        return judge_prefilled(family, found, mine.same)

    return Case("prefill", arguments, call, judge, wanted_of([a._replace(same=None) for a in arguments]))


class _BrokenTimeline(Timeline):
    def take(self, *_: Any, **__: Any) -> None:
        raise Planted("in the timeline")


def _option(random: Random) -> Argument:
    name = random.choice(
        (
            "keep_logits",
            "only",
            "timeline",
            "on_done",
            "on_done raises",
            "timeline raises",
            "a timeline",
            "on_done gives an odd value",
        )
    )
    kind, value = odd_value(random)
    if name == "on_done raises":
        error, after = some_error(random), random.randrange(6)
        seen: list[Any] = []

        def on_done(op: Any) -> None:
            seen.append(op)
            if len(seen) > after:
                raise error()

        return Argument(f"on_done raises {type(error()).__name__}", {"on_done": on_done}, ODD)
    if name == "timeline raises":
        return Argument("a timeline whose take raises", {"timeline": _BrokenTimeline()}, ODD)
    if name == "a timeline":
        return Argument("a timeline", {"timeline": Timeline()}, RIGHT)
    if name == "on_done gives an odd value":
        return Argument(f"on_done gives {kind}", {"on_done": lambda op: value}, RIGHT)
    return Argument(f"{name} is {kind}", {name: value}, ODD)


def prefill_options(draw: Draw, stage: Stage) -> Case:
    """Right sequences; keep_logits, only, timeline or on_done mutated."""
    family, setting = draw.random.choice(FAMILIES), draw.random.randrange(len(SETTINGS))
    sequences = [some_sequences(draw.random) for _ in range(draw.size)][draw.rank]
    arguments = draw.per_rank(_option, lambda random: Argument("nothing odd", {}))
    model = stage.model(family, setting)

    def call() -> Any:
        return model.prefill(sequences, **arguments[draw.rank].value)

    def judge(found: Any) -> str | None:
        return judge_prefilled(family, found, sequences)

    return Case("prefill's options", arguments, call, judge, wanted_of(arguments), may_defer=True)
