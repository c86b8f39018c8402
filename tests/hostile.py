"""Exceptions and objects that make life hard for whoever looks at them."""

from __future__ import annotations


class Hostile:
    """Raises `error` for its length, items, words, truth, comparison, attributes: whatever is asked of it."""

    def __init__(self, error: type[BaseException] = ValueError) -> None:
        object.__setattr__(self, "_error", error)

    def _refuse(self, *args, **named):
        raise object.__getattribute__(self, "_error")("planted")

    __len__ = __iter__ = __getitem__ = __repr__ = __str__ = __bool__ = __eq__ = __ne__ = __hash__ = __index__ = (
        __int__
    ) = __float__ = _refuse
    __array__ = __call__ = __fspath__ = __lt__ = __gt__ = __add__ = __radd__ = __contains__ = __getattr__ = _refuse


class Speechless(Exception):
    """Its words raise."""

    def __init__(self, *said) -> None:
        self.said = said

    def __str__(self) -> str:
        raise KeyboardInterrupt

    __repr__ = __str__


def broken_off(error: type[BaseException] = KeyError):
    """An iterator of one item, and then an exception."""
    yield 1
    raise error("planted")
