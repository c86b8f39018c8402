"""Whatever looking at an argument raises is an error with words."""

import itertools

import numpy as np
import pytest
import torch

from pipemoe.arguments import look, shown, step_lengths, whole_number
from pipemoe.comm.exchange import encode_error, raise_first
from pipemoe.errors import CheckpointError, ConfigError, InputError, PeerLost, describe
from tests.hostile import Speechless


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    "error",
    [ValueError("odd"), KeyboardInterrupt(), GeneratorExit(), SystemExit(3), Speechless(), RecursionError("x" * 10**6)],
    ids=lambda e: type(e).__name__,
)
def test_anything_becomes_the_error_that_can_be_told(error):
    found, wrong = look(2, "arguments of a step", raising(error))
    assert found is None and type(wrong) is InputError and wrong.__cause__ is error
    assert str(wrong).startswith(f"rank 2: arguments of a step: {type(error).__name__}") and len(str(wrong)) < 5000
    with pytest.raises(InputError, match=f"^rank 2: arguments of a step: {type(error).__name__}"):
        raise_first([b"", b"", encode_error(wrong)])


def test_errors_of_pipemoe_stay_as_they_are_and_final_ones_are_raised():
    error = ConfigError("mode is odd")
    assert look(0, "x", raising(error), CheckpointError) == (None, error)
    assert look(0, "x", lambda: 5) == (5, None)
    with pytest.raises(PeerLost):
        look(0, "x", raising(PeerLost("gone")))


def test_words_whatever_they_do():
    assert describe(ValueError("x")) == "ValueError: x" and describe(ValueError()) == "ValueError"
    assert "its own words cannot be had: __str__ raises KeyboardInterrupt" in describe(Speechless())
    assert shown(Speechless()) == "a Speechless" and shown("x" * 100) == "a str" and shown([1]) == "[1]"


@pytest.mark.parametrize(
    "value",
    [3, np.uint8(3), np.uint64(3), np.int16(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.uint8)],
    ids=repr,
)
def test_whole_numbers_of_any_kind(value):
    assert whole_number("n", value, 1) == 3 and type(whole_number("n", value, 1)) is int


@pytest.mark.parametrize(
    "value",
    [
        3.0,
        "3",
        None,
        True,
        np.True_,
        np.float32(3),
        torch.tensor(3.0),
        torch.tensor(True),
        torch.ones(2, dtype=torch.int64),
        np.ones(2, int),
        -1,
        0,
        [3],
        Speechless(),
    ],
    ids=shown,
)
def test_what_is_no_whole_number_of_at_least_1(value):
    with pytest.raises(ConfigError, match="^n is .*; it must be a whole number of at least 1"):
        whole_number("n", value, 1, ConfigError)


def test_lengths_of_a_step():
    assert (
        step_lengths(3, (1, 2), 3)
        == (1, 2)
        == step_lengths(3, np.array([1, 2], np.uint16), 3)
        == step_lengths(3, iter([1, torch.tensor(2)]), 3)
    )
    assert step_lengths(3, (), 3) == ()
    for lengths in ((0,), (-1,), (2.0,), (True,), (None,), ([1],), (1, "2")):
        with pytest.raises(InputError, match="rank 3: sequence length"):
            step_lengths(3, lengths, 10)
    for lengths in (None, 5, "12", b"\1", 2.5):
        with pytest.raises(InputError, match="rank 3: lengths is "):
            step_lengths(3, lengths, 10)
    with pytest.raises(InputError, match="rank 3: 11 tokens in one step, more than max_tokens_per_rank=10"):
        step_lengths(3, (5, 6), 10)
    for lengths in (itertools.repeat(1), (10**30,)):
        with pytest.raises(
            InputError, match=r"rank 3: \d+ (or more )?tokens in one step, more than max_tokens_per_rank=10"
        ):
            step_lengths(3, lengths, 10)
