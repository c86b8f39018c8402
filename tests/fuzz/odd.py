"""Values that callers pass by mistake, and objects that fail when they are looked at."""

from __future__ import annotations

import array
import collections
import decimal
import enum
import fractions
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch

from tests.fuzz.case import Planted

_LOOKED_AT = (
    *(
        "__len__",
        "__iter__",
        "__getitem__",
        "__index__",
        "__int__",
        "__float__",
        "__bool__",
        "__repr__",
        "__str__",
        "__eq__",
    ),
    *(
        "__hash__",
        "__getattr__",
        "__array__",
        "__fspath__",
        "__lt__",
        "__format__",
        "__contains__",
        "__add__",
        "__call__",
    ),
)


class Unsayable(Exception):
    """An exception that cannot be put into words."""

    def __str__(self) -> str:
        raise ValueError("no words")

    __repr__ = __str__


class Small(enum.IntEnum):
    ONE = 1


def raising(error: Callable[[], BaseException], *methods: str) -> Any:
    """An object whose `methods` raise."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error()

    return type("Raising", (), dict.fromkeys(methods, fail))()


def some_error(random: Random) -> Callable[[], BaseException]:
    """What an argument may raise while it is looked at."""
    kinds = (
        Planted,
        Unsayable,
        RecursionError,
        MemoryError,
        KeyError,
        OSError,
        StopIteration,
        NotImplementedError,
        AttributeError,
        AssertionError,
    )
    kind = random.choice(kinds)
    return lambda: kind("planted")


def _itself() -> list:
    values: list = []
    values.append(values)
    return values


def _deep(depth: int = 3000) -> list:
    values: list = [1]
    for _ in range(depth):
        values = [values]
    return values


_MAKERS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "-1": lambda: -1,
    "1.5": lambda: 1.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: float("-inf"),
    "10**30": lambda: 10**30,
    "-10**30": lambda: -(10**30),
    "10**5000": lambda: 10**5000,  # Python refuses to print it
    "2**63": lambda: 2**63,
    "complex": lambda: 1j,
    "empty string": lambda: "",
    "digits": lambda: "7",
    "text": lambda: "text " * 20,
    "lone surrogate": lambda: "\ud800",
    "null character": lambda: "a\0b",
    "percent and braces": lambda: "%s {0} {x}",
    "bytes": lambda: b"\x01\x02",
    "bytearray": lambda: bytearray(b"\x01"),
    "empty list": list,
    "list of lists": lambda: [[1], [2]],
    "empty tuple": tuple,
    "dict": lambda: {1: 2},
    "empty dict": dict,
    "set": lambda: {1, 2},
    "object": object,
    "a type": lambda: int,
    "lambda": lambda: lambda: None,
    "range": lambda: range(3),
    "generator": lambda: (n for n in (1, 2)),
    "Ellipsis": lambda: ...,
    "slice": lambda: slice(1, 2),
    "Decimal": lambda: decimal.Decimal("1.5"),
    "Decimal NaN": lambda: decimal.Decimal("sNaN"),
    "Fraction": lambda: fractions.Fraction(1, 2),
    "IntEnum": lambda: Small.ONE,
    "array.array": lambda: array.array("i", [1, 2]),
    "deque": lambda: collections.deque([1, 2]),
    "defaultdict": lambda: collections.defaultdict(list),
    "np.int64": lambda: np.int64(1),
    "np.bool": lambda: np.bool_(True),
    "np.float32": lambda: np.float32(1),
    "np.str": lambda: np.str_("auto"),
    "np.array 0-d": lambda: np.array(1),
    "np.array 1-d": lambda: np.arange(3),
    "np.array 2-d": lambda: np.ones((2, 2)),
    "np.array of objects": lambda: np.array([None, "x"], dtype=object),
    "np.datetime64": lambda: np.datetime64("2026-01-01"),
    "np.ma": lambda: np.ma.array([1, 2], mask=[True, False]),
    "tensor 0-d": lambda: torch.tensor(1),
    "tensor 1-d": lambda: torch.arange(3),
    "tensor empty": lambda: torch.empty(0),
    "tensor meta": lambda: torch.empty(2, 2, device="meta"),
    "tensor sparse": lambda: torch.eye(2).to_sparse(),
    "tensor complex": lambda: torch.ones(2, dtype=torch.complex64),
    "tensor grad": lambda: torch.ones(2, requires_grad=True),
    "a torch dtype": lambda: torch.float32,
    "a torch device": lambda: torch.device("meta"),
    "an exception": lambda: ValueError("as a value"),
    "a list that holds itself": _itself,
    "a deep list": _deep,
    "a module": lambda: torch.nn.Linear(1, 1),
}


def odd_value(random: Random) -> tuple[str, Any]:
    """A name for it, and a value of any type; made anew each time."""
    if random.random() < 0.25:
        methods = random.sample(_LOOKED_AT, random.choice((1, 1, 2, 5)))
        error = some_error(random)
        return f"an object whose {', '.join(methods)} raise {type(error()).__name__}", raising(error, *methods)
    name = random.choice(list(_MAKERS))
    return name, _MAKERS[name]()


def odd_number(random: Random, near: int) -> tuple[str, Any]:
    """A number, or nearly one, around what `near` says."""
    choices: dict[str, Any] = {
        **{
            str(n): n
            for n in (0, -1, near - 1, near + 1, 2 * near, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30)
        },
        **{
            f"{type(v).__name__} {v}": v
            for v in (
                np.int64(near),
                np.int32(near),
                np.uint8(min(near, 255)),
                np.float64(near),
                float(near),
                f"{near}",
                True,
                False,
            )
        },
        **{
            "nan": float("nan"),
            "inf": float("inf"),
            "None": None,
            "tensor": torch.tensor(near),
            "np.array 0-d": np.array(near),
            "list": [near],
        },
        "an object with __index__": type("Index", (), {"__index__": lambda self: near})(),
    }
    name = random.choice(list(choices))
    return name, choices[name]
