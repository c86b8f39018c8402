"""Checks of callers' arguments whose errors can be told to every rank.

Arguments may be anything, and may raise anything while they are looked at (`__len__`, `__iter__`, `dtype`, a
generator). A rank that raised at once would be missing from the exchange that the others are in. So each entry point
looks at its arguments inside `look`, takes part in the exchange with the error that it found, and the exchange raises
the error on every rank.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, TypeVar

from pipemoe.errors import FatalError, InputError, PipemoeError, describe

T = TypeVar("T")


def look(
    rank: int, what: str, looking: Callable[[], T], wrong: type[PipemoeError] = InputError
) -> tuple[T | None, PipemoeError | None]:
    """The result of `looking` and no error, or None and the error that it raised.

    Errors of pipemoe stay as they are. Everything else becomes `wrong`, with `what` in its words, even if it is no
    Exception (a caller's iterator may raise GeneratorExit). Only a FatalError is raised: after it there is no exchange.
    """
    try:
        return looking(), None
    except FatalError:
        raise
    except PipemoeError as error:
        return None, error
    except BaseException as error:  # noqa: BLE001
        found = wrong(f"rank {rank}: {what}: {describe(error)}")
        found.__cause__ = error
        return None, found


def whole_number(name: str, value: Any, least: int, wrong: type[PipemoeError] = InputError) -> int:
    """`value` as an int: an int of Python or numpy, or a 0-d tensor of integers. Raises `wrong` for others, booleans,
    and less than `least`.
    """
    message = f"{name} is {shown(value)}; it must be a whole number of at least {least}"
    try:
        number = None if "bool" in str(getattr(value, "dtype", type(value).__name__)) else operator.index(value)
    except BaseException as error:  # noqa: BLE001
        raise wrong(message) from error
    if number is None or number < least:
        raise wrong(message)
    return number


def step_lengths(rank: int, lengths: Any, max_tokens: int) -> tuple[int, ...]:
    """`lengths` of this rank's sequences as ints. Raises InputError, naming the rank, for what cannot be a step's."""
    where = f"rank {rank}: "
    if isinstance(lengths, (str, bytes)) or not isinstance(lengths, Iterable):
        raise InputError(f"{where}lengths is {shown(lengths)}; it must be a list of the sequences' lengths in tokens")
    # it may have no end
    found = tuple(whole_number(f"{where}sequence length", n, 1) for n in islice(lengths, max_tokens + 1))
    if sum(found) > max_tokens:
        more = "or more " if len(found) > max_tokens else ""
        raise InputError(f"{where}{sum(found)} {more}tokens in one step, more than max_tokens_per_rank={max_tokens}")
    return found


def shown(value: Any) -> str:
    """A value as messages show it: short, however long its repr is."""
    try:
        text = repr(value)
    except BaseException:  # noqa: BLE001
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"a {type(value).__name__}"
